"""The demo's model trained by every alias that Optax has too, from the same start: here and in Optax, and the two losses.

    python benchmarks/against_optax.py                   docs/against-optax.md, some ten minutes
    python benchmarks/against_optax.py --only adam lion  some of the rows; the others stay
    python benchmarks/against_optax.py --steps 10        a trial, which writes nothing
    python benchmarks/against_optax.py --float32         another

The model is that of examples/train_gpt.py, smaller; in JAX it is written again, and first of all its loss and its gradients are
compared with torch's. An alias whose loss in the end is not within 1 % of Optax's is named, and the exit code is 1.

All is in float64: some aliases train at the edge of stability, where rounding in float32 alone moves the loss by some per cent.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import jax
import jax.numpy as jnp
import optax
import report
import torch
from gpt import data
from gpt.model import GPT, cross_entropy
from gpt.settings import Size
from torch import Tensor
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import optfn

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs/against-optax.md", ROOT / "benchmarks/results/against_optax.json"
SIZE = Size(layers=2, heads=2, width=64, context=64, batch=8)
STEPS, SEED, BAR = 100, 0, 0.01
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Of the loss and the gradients at the start, relative to the loss and to the largest entry of a leaf."""

Params = dict[str, Any]


class Pair(NamedTuple):
    """An alias as it is called in either library, as text: what the page shows is what ran.

    Attributes:
        ours: in optfn's names, among them ``torch`` and ``optfn``.
        theirs: in Optax's, among them ``contrib``, ``jnp`` and ``optax``.
        needs: of ``value``, ``obj_fn`` and ``grad_fn``, what an update is given; ``examples``: its gradients are those of each;
            ``one batch``: every step is of the first batch, and so are the losses.
        note: why the arguments are others, or the numbers.
        others: the numbers are others by design. Then the loss may be any that is not above Optax's by more than the bar.
    """

    ours: str
    theirs: str
    needs: tuple[str, ...] = ()
    note: str = ""
    others: bool = False


MUON = (
    'partition({"muon": chain(scale_by_muon(), scale_by_shape(weight_dimension_numbers=MuonDimensionNumbers()), '
    'scale_by_learning_rate(1e-2)), "adam": nadamw(1e-2, weight_decay=0.0)}, lambda path, p: "muon" if p.ndim == 2 else "adam")'
)
ALIASES: dict[str, Pair] = {
    "acprop": Pair(
        "acprop(1e-4, eps=0.0)",
        "contrib.acprop(lambda t: jnp.where(t > 0, 1e-4 / 0.9, 1e-4), eps=0.0, eps_root=1e-16 / 0.9**2)",
        note="Optax takes the deviation from the average of the step before, the authors from the new one: from the second step "
        "on, its steps are 0.9 of theirs",
    ),
    "adabelief": Pair("adabelief(1e-3)", "adabelief(1e-3)"),
    "adadelta": Pair("adadelta(3.0)", "adadelta(3.0)"),
    "adafactor": Pair(
        "adafactor(1e-2, eps=(1e-30, 1e-3))",
        "adafactor(lambda t: jnp.minimum(1e-2, (t + 1) ** -0.5), min_dim_size_to_factor=1)",
        note="torch's rate is at most the inverse root of the step, as in the paper, and all its matrices are factored",
    ),
    "adagrad": Pair(
        "adagrad(1e-1, initial_accumulator_value=0.1, eps=0.0)",
        "adagrad(1e-1, eps=0.0)",
        note="torch's sum of squares begins at 0; its epsilon is outside of the root, Optax's inside",
    ),
    "adam": Pair("adam(1e-3)", "adam(1e-3)"),
    "adamax": Pair("adamax(2e-3)", "adamax(2e-3)"),
    "adamaxw": Pair("adamaxw(2e-3, weight_decay=0.1)", "adamaxw(2e-3, weight_decay=0.1)"),
    "adamw": Pair("adamw(1e-3, betas=(0.9, 0.99), weight_decay=0.1)", "adamw(1e-3, b1=0.9, b2=0.99, weight_decay=0.1)"),
    "adan": Pair(
        "adan(1e-3, betas=(0.98, 0.5, 0.99), eps_root=1e-8)",
        "adan(1e-3, b2=0.5)",
        note="Optax weighs the change of the gradients with 1 - b2, the authors with b2: both are the same at 1/2",
    ),
    "ademamix": Pair("ademamix(1e-3)", "contrib.ademamix(1e-3)"),
    "adopt": Pair("adopt(1e-3)", "contrib.adopt(1e-3)"),
    "amsgrad": Pair("amsgrad(1e-3)", "amsgrad(1e-3)"),
    "cocob": Pair("cocob()", "contrib.cocob()"),
    "dadapt_adamw": Pair("dadapt_adamw()", "contrib.dadapt_adamw()"),
    "dog": Pair('dog(init_step=("learning_rate", 1e-2))', 'contrib.dog(init_step=("learning_rate", 1e-2))'),
    "dowg": Pair("dowg()", "contrib.dowg()"),
    "dpsgd": Pair("dpsgd(1.0, 0.5, 0.1, key=0)", "contrib.dpsgd(1.0, 0.5, 0.1, seed=0)", ("examples",)),
    "fromage": Pair("fromage(1e-2)", "fromage(1e-2)"),
    "galore": Pair("galore(1e-3, rank=16)", "contrib.galore(1e-3, rank=16)"),
    "lamb": Pair("lamb(1e-2)", "lamb(1e-2)"),
    "lars": Pair("lars(10.0, weight_decay=1e-4)", "lars(10.0, weight_decay=1e-4)"),
    "lbfgs": Pair(
        "chain(scale_by_lbfgs(), scale_by_learning_rate(0.1))",
        "lbfgs(0.1, linesearch=None)",
        ("one batch",),
        "{func}`optfn.lbfgs` is torch's; Optax's is this chain, here without the zoom line search; all steps are of "
        "one batch, as are the losses",
    ),
    "lion": Pair("lion(3e-4)", "lion(3e-4)"),
    "madgrad": Pair("madgrad(1e-2)", "contrib.madgrad(1e-2)"),
    "mechanize": Pair("mechanize(adam(1e-3))", "contrib.mechanize(adam(1e-3))"),
    "momo": Pair("momo()", "contrib.momo()", ("value",)),
    "momo_adam": Pair("momo_adam(1e-2)", "contrib.momo_adam(1e-2)", ("value",)),
    "muon": Pair(
        MUON,
        "contrib.muon(1e-2)",
        note="{func}`optfn.muon` is torch's, for matrices alone; Optax's is in [Coming from Optax](from-optax.md)",
    ),
    "nadam": Pair(
        "nadam(2e-3, momentum_decay=1e6)",
        "nadam(2e-3)",
        note="torch's momentum climbs from half of b1 to b1, at once with this decay; Optax's is b1",
    ),
    "nadamw": Pair("nadamw(2e-3)", "nadamw(2e-3)"),
    "noisy_sgd": Pair("noisy_sgd(1e-1, key=0)", "noisy_sgd(1e-1, key=0)"),
    "novograd": Pair("novograd(1e-2)", "novograd(1e-2)"),
    "optimistic_adam_v2": Pair("optimistic_adam_v2(1e-3)", "optimistic_adam_v2(1e-3)"),
    "optimistic_gradient_descent": Pair("optimistic_gradient_descent(1e-1)", "optimistic_gradient_descent(1e-1)"),
    "polyak_sgd": Pair("polyak_sgd(max_learning_rate=0.3)", "polyak_sgd(max_learning_rate=0.3)", ("value",)),
    "prodigy": Pair("prodigy()", "contrib.prodigy()"),
    "radam": Pair("radam(1e-2)", "radam(1e-2)"),
    "rmsprop": Pair(
        "rmsprop(1e-3, alpha=0.99)",
        "rmsprop(1e-3, decay=0.99, eps_in_sqrt=False)",
        note="torch's epsilon is outside of the root; its decay is 0.99, Optax's 0.9",
    ),
    "rprop": Pair(
        "rprop(1e-4)",
        "rprop(1e-4)",
        note="Optax answers with the update of the step before",
        others=True,
    ),
    "sam": Pair(
        "sam(sgd(0.1), chain(normalize(), sgd(0.05)))",
        "contrib.sam(sgd(0.1), chain(contrib.normalize(), sgd(0.05)))",
    ),
    "sam, opaque": Pair(
        "sam(adam(1e-3), chain(normalize(), sgd(0.05)), opaque_mode=True)",
        "contrib.sam(adam(1e-3), chain(contrib.normalize(), sgd(0.05)), opaque_mode=True)",
        ("grad_fn",),
    ),
    "schedule_free": Pair(
        "schedule_free(rmsprop(2e-3), 2e-3)", "contrib.schedule_free(rmsprop(2e-3, 0.99, eps_in_sqrt=False), 2e-3)"
    ),
    "schedule_free_adamw": Pair("schedule_free_adamw()", "contrib.schedule_free_adamw()"),
    "schedule_free_sgd": Pair("schedule_free_sgd(0.5)", "contrib.schedule_free_sgd(0.5)"),
    "sgd": Pair("sgd(0.1, momentum=0.9, nesterov=True)", "sgd(0.1, momentum=0.9, nesterov=True)"),
    "sign_sgd": Pair("sign_sgd(3e-4)", "sign_sgd(3e-4)"),
    "signum": Pair("signum(3e-4)", "signum(3e-4)"),
    "simplified_ademamix": Pair("simplified_ademamix(1e-5)", "contrib.simplified_ademamix(1e-5)"),
    "sm3": Pair("sm3(0.1)", "sm3(0.1)"),
    "sophia": Pair("sophia(1e-3)", "contrib.sophia(1e-3)", ("obj_fn",)),
    "yogi": Pair("yogi(1e-3)", "yogi(1e-3)"),
}


class Problem:
    """The model in both libraries, its start, and batches that are functions of the step."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        text, validation, self.digest = data.standard_library()
        self.model = GPT(SIZE, SEED).to(dtype)
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.batch = lambda step: data.random_batch(text, SEED, step, SIZE.batch, SIZE.context)
        self.held_out = data.even_batches(validation, 8, SIZE.batch, SIZE.context)
        self.gradients = grad_and_value(self.loss)
        self.gradients_of_examples = vmap(grad(lambda p, x, y: self.loss(p, x[None], y[None])), (None, 0, 0))
        self.jax_loss = jax.jit(jax_loss)
        self.jax_gradients = jax.jit(jax.value_and_grad(jax_loss))
        self.jax_gradients_of_examples = jax.jit(jax.vmap(jax.grad(lambda p, x, y: jax_loss(p, x[None], y[None])), (None, 0, 0)))

    def loss(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(self.model, params, (x,)), y)

    def judged(self, pair: Pair) -> list[tuple[Tensor, Tensor]]:
        """What the losses are of."""
        return [self.batch(1)] if "one batch" in pair.needs else self.held_out

    def check(self) -> float:
        """The largest difference at the start, relative to the largest entry of its leaf.

        Raises:
            ValueError: the model in JAX is not that in torch.
        """
        x, y = self.batch(0)
        grads, loss = self.gradients(self.start, x, y)
        jax_value, jax_grads = self.jax_gradients(*to_jax((self.start, x, y)))
        ours, theirs = {"loss": loss, **grads}, {"loss": jax_value, **jax_grads}
        found = {name: difference(g, to_torch(theirs[name])) for name, g in ours.items()}
        worst = max(found, key=found.__getitem__)
        if not found[worst] <= TOLERANCE[self.dtype]:
            raise ValueError(f"{worst} differs by {found[worst]:.1e} between JAX and torch: that is another model")
        return found[worst]


def difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def jax_loss(params: Params, x: Any, y: Any) -> Any:
    """examples/gpt/model.py in JAX, of the same parameters by the same names."""

    def normed(x: Any, weight: str) -> Any:
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * params[weight]

    def linear(x: Any, weight: str) -> Any:
        return x @ params[weight].T

    (batch, time), causal = x.shape, jnp.tril(jnp.ones((x.shape[1],) * 2, bool))
    x = params["token.weight"][x] + params["position.weight"][:time]
    for name in (f"blocks.{i}" for i in range(SIZE.layers)):
        heads = linear(normed(x, f"{name}.ln_1.weight"), f"{name}.qkv.weight").reshape(batch, time, 3, SIZE.heads, -1)
        q, k, v = heads.transpose(2, 0, 3, 1, 4)
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
        mixed = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)) @ v
        x = x + linear(mixed.swapaxes(1, 2).reshape(x.shape), f"{name}.attn_out.weight")
        inner = jax.nn.gelu(linear(normed(x, f"{name}.ln_2.weight"), f"{name}.mlp_in.weight"), approximate=False)
        x = x + linear(inner, f"{name}.mlp_out.weight")
    logits = linear(normed(x, "ln_f.weight"), "token.weight")
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[..., None], -1).mean()


def to_jax(tree: Any) -> Any:
    return optfn.tree.map(lambda x: jnp.asarray(x.numpy()), tree)


def to_torch(x: Any) -> Tensor:
    return torch.tensor(jax.device_get(x))


def losses(pair: Pair, problem: Problem, steps: int) -> Iterator[tuple[float, float]]:
    """Both losses: before the first step, then after the last. Both sides step in turn."""
    sides = ours(pair, problem), theirs(pair, problem)
    yield tuple(evaluate() for _, evaluate in sides)  # type: ignore[misc]
    for step in range(1, steps + 1):
        x, y = problem.batch(1 if "one batch" in pair.needs else step)
        for advance, _ in sides:
            advance(x, y)
    yield tuple(evaluate() for _, evaluate in sides)  # type: ignore[misc]


Side = tuple[Callable[[Tensor, Tensor], None], Callable[[], float]]


def ours(pair: Pair, problem: Problem) -> Side:
    """A step of a batch here, and the loss, of schedule-free parameters that of their average."""
    tx = eval(pair.ours, {**vars(optfn), "optfn": optfn, "torch": torch})
    params = problem.start
    state = tx.init(params)

    def advance(x: Tensor, y: Tensor) -> None:
        nonlocal params, state
        grads, value = problem.gradients(params, x, y)
        if "examples" in pair.needs:
            grads = problem.gradients_of_examples(params, x, y)
        given = {
            "value": value,
            "obj_fn": lambda p: problem.loss(p, x, y),
            "grad_fn": lambda p, i: grad(problem.loss)(p, x, y),
        }
        updates, state = tx.update(grads, state, params, **{name: given[name] for name in pair.needs if name in given})
        params = optfn.apply_updates(params, updates)

    def evaluate() -> float:
        final = optfn.schedule_free_eval_params(state, params) if "schedule_free" in pair.ours else params
        batches = problem.judged(pair)
        return sum(problem.loss(final, x, y).item() for x, y in batches) / len(batches)

    return advance, evaluate


def theirs(pair: Pair, problem: Problem) -> Side:
    """The same in Optax."""
    names = {**vars(optax), "optax": optax, "contrib": optax.contrib, "jnp": jnp}
    tx = optax.with_extra_args_support(eval(pair.theirs, names))
    params = to_jax(problem.start)
    state = tx.init(params)

    @jax.jit
    def update(grads: Any, state: Any, params: Any, value: Any, x: Any, y: Any) -> Any:
        given = {
            "value": value,
            "obj_fn": lambda p: jax_loss(p, x, y),
            "grad_fn": lambda p, i: jax.grad(jax_loss)(p, x, y),
        }
        updates, state = tx.update(grads, state, params, **{name: given[name] for name in pair.needs if name in given})
        return optax.apply_updates(params, updates), state

    def advance(x: Tensor, y: Tensor) -> None:
        nonlocal params, state
        x, y = to_jax((x, y))
        value, grads = problem.jax_gradients(params, x, y)
        if "examples" in pair.needs:
            grads = problem.jax_gradients_of_examples(params, x, y)
        params, state = update(grads, state, params, value, x, y)

    def evaluate() -> float:
        final = optax.contrib.schedule_free_eval_params(state, params) if "schedule_free" in pair.theirs else params
        batches = problem.judged(pair)
        return sum(problem.jax_loss(final, *to_jax(batch)).item() for batch in batches) / len(batches)

    return advance, evaluate


def reached(row: dict[str, Any]) -> bool:
    """Within the bar of Optax's loss, or not above it by more where the numbers are others by design; never where one is NaN."""
    quotient = row["ours"] / row["theirs"]
    return quotient <= 1 + BAR and (quotient >= 1 - BAR or row["others"])


def page(results: dict[str, Any]) -> str:
    rows, size, machine = results["rows"], Size(*results["size"]), results["machine"]
    start, versions = next(iter(rows.values()))["start"], machine["versions"]
    lines = [
        "# Against Optax",
        "",
        "Made by `make against-optax`, that is `python benchmarks/against_optax.py`.",
        "",
        "Every alias that Optax has too trains the model of `make demo`, a byte-level GPT on the source of Python's standard",
        f"library, here and in Optax: from the same parameters, on the same batches, {results['steps']} steps, with the same keys",
        f"where there is noise. It has {size.layers} layers of width {size.width}, {size.heads} heads and contexts of",
        f"{size.context} bytes, {size.batch} in a batch. In JAX it is written again; at the start its loss and its gradients are",
        f"within {results['difference']:.0e} of torch's. What is called is what the columns show. The losses are those of held-out",
        f"batches, in nats per byte; before the first step they are {start:.3f}.",
        "",
        f"**{count(rows)}.** All is in float64. In float32, which is `--float32`, some aliases train at the edge of stability:",
        "what rounding changes grows until it is some per cent of the loss, in Optax as here.",
        "",
        f"optfn {versions['optfn']} on torch {versions['torch']}, Optax {versions['optax']} on JAX {versions['jax']}; "
        f"{machine['cpu']}, {machine['threads']} threads.",
        "",
        "| | optfn | Optax | Loss here | Loss in Optax | Quotient |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        calls = [f"`{row[side]}`" for side in ("call", "optax")]
        mark = "" if reached(row) else " **not reached**"
        cells = [name, *calls, f"{row['ours']:.4f}", f"{row['theirs']:.4f}", f"{row['ours'] / row['theirs']:.4f}{mark}"]
        lines.append(f"| {' | '.join(cells)} |")
    for others, title in (
        (False, "Arguments that make both the same:"),
        (True, "Other numbers by design, whose loss may be any below:"),
    ):
        notes = {name: row["note"] for name, row in rows.items() if row["note"] and row["others"] is others}
        if notes:
            lines += ["", title, "", *(f"- {name}: {note}." for name, note in notes.items())]
    return "\n".join(lines) + "\n"


def count(rows: dict[str, Any]) -> str:
    same, others = ({name: reached(row) for name, row in rows.items() if row["others"] is by_design} for by_design in (False, True))
    said = f"{sum(same.values())} of {len(same)} aliases are within {100 * BAR:g} % of Optax's loss"
    if others:
        said += f", {sum(others.values())} of {len(others)} with other numbers by design not above it"
    missed = [name for name, good in (same | others).items() if not good]
    return said + (f"; not {', '.join(missed)}" if missed else "")


@contextmanager
def the_same_numbers(dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """JAX in ``dtype``; attention that can be mapped and differentiated twice, nothing recorded by torch, its sums in one order."""
    wide, rademacher, ordered = jax.config.jax_enable_x64, jax.random.rademacher, torch.are_deterministic_algorithms_enabled()

    def signs(key: Any, shape: Any, dtype: Any) -> Any:
        """With 64-bit numbers JAX draws other signs than without: those without are optfn's."""
        return (2 * jax.random.bernoulli(key, jnp.float32(0.5), shape) - 1).astype(dtype)

    jax.config.update("jax_enable_x64", dtype == torch.float64)
    jax.random.rademacher = signs
    torch.use_deterministic_algorithms(True)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        jax.config.update("jax_enable_x64", wide)
        jax.random.rademacher = rademacher
        torch.use_deterministic_algorithms(ordered)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the aliases; what an earlier run found of others stays")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"with another number than {STEPS} nothing is written")
    parser.add_argument("--float32", action="store_true", help="in place of float64; nothing is written")
    args = parser.parse_args(argv)
    if unknown := {*(args.only or ())} - {*ALIASES}:
        parser.error(f"no alias is called {', '.join(sorted(unknown))}; there are {', '.join(ALIASES)}")
    begin, kept = time.perf_counter(), args.steps == STEPS and not args.float32
    dtype = torch.float32 if args.float32 else torch.float64
    with the_same_numbers(dtype):
        problem = Problem(dtype)
        results = {"steps": args.steps, "size": list(SIZE), "text": problem.digest, "machine": report.machine("cpu")}
        earlier = json.loads(RESULTS.read_text()) if args.only and kept and RESULTS.exists() else None
        if earlier and any(earlier[key] != x for key, x in results.items()):
            parser.error(f"{RESULTS} is from another machine, other versions or another text: run all again")
        rows: dict[str, Any] = dict(earlier["rows"]) if earlier else {}
        results |= {"difference": problem.check(), "rows": rows}
        chosen = args.only or list(ALIASES)
        with tqdm(chosen, unit="alias", dynamic_ncols=True) as bar:
            for name in bar:
                bar.set_description(name)
                pair = ALIASES[name]
                (start, _), (mine, yours) = losses(pair, problem, args.steps)
                rows[name] = {"call": pair.ours, "optax": pair.theirs, "note": pair.note, "others": pair.others}
                rows[name] |= {"start": start, "ours": mine, "theirs": yours}
                verdict = "" if reached(rows[name]) else "   NOT WITHIN THE BAR"
                bar.write(f"{name:30}{mine:9.4f}{yours:9.4f}{mine / yours:9.4f}{verdict}")
                if kept:
                    results["rows"] = rows = {key: rows[key] for key in ALIASES if key in rows}
                    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                    PAGE.write_text(page(results))
    found = {name: rows[name] for name in chosen}
    where = f"{PAGE}, after" if kept else "nothing written;"
    print(f"{where} {(time.perf_counter() - begin) / 60:.1f} minutes")
    print(count(found))
    return 0 if all(map(reached, found.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
