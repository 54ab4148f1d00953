"""One algorithm family a file: its slots, its rule, its alias, its reference."""
