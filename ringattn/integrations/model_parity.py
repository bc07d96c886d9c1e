"""A model of transformers over sharded sequences against itself in one process, before anybody spends GPU hours.

The reference runs each document by itself through the model as it came, so that it owes nothing to packing, masks or
shards. Compared are every attention layer's output, the logits, the loss and every parameter's gradient; then one token
of the first document is changed, and no logit of another document may change by a bit.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from ringattn.checking import shown
from ringattn.errors import InputError
from ringattn.integrations.huggingface import attach, sharding_of
from ringattn.mesh import Mesh
from ringattn.naming import imported
from ringattn.training import sum_gradients, total

LIMIT = 1e-5  # relative, float32
ROUNDING = 1e-11  # of float64, several layers deep
EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")  # what configs call their number
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 512,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_local_experts": 4,
}
"""The most that a shrunk model keeps of each. Heads keep their ratio; layers are one of each kind, and one."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a pass over a sequence gave, in its order; gradients are of the mean loss over all labels."""

    layers: dict[str, Tensor]
    logits: Tensor
    loss: float
    gradients: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Parity:
    """How far the sharded model is from itself in one process: relative differences, and tokens that leaked.

    Attributes:
        layers: of every attention layer's output, first layers first.
        leaks: tokens of other documents whose logits changed with the first document's.
        moved: whether changing a token changed anything at all.
    """

    layers: dict[str, float]
    logits: float
    loss: float
    gradients: dict[str, float]
    leaks: list[int]
    moved: bool

    @property
    def first(self) -> str | None:
        """The first attention layer that differs."""
        return next((name for name, error in self.layers.items() if not error <= LIMIT), None)

    @property
    def worst(self) -> tuple[str, float]:
        """The parameter whose gradient differs the most."""
        return max(self.gradients.items(), key=lambda item: item[1], default=("none", 0.0))

    @property
    def passed(self) -> bool:
        differences = (*self.layers.values(), self.logits, self.loss, self.worst[1])
        return all(error <= LIMIT for error in differences) and not self.leaks and self.moved


def load_model(source: str, *, shrink: bool = False, seed: int = 0) -> PreTrainedModel:
    """A model with random weights: of a config, a folder with one, or ``module:function`` that makes a model.

    Args:
        shrink: whether to keep the kinds of layers and the ratios of heads alone (`SMALL`).

    Raises:
        InputError: there is no such config, or no language model of its type.
    """
    torch.manual_seed(seed)
    if ":" in source and not Path(source).exists():
        model = _made(source)
        if not isinstance(model, PreTrainedModel):
            raise InputError(f"--model {source} must make a transformers model; got {shown(model)}.")
        return _evaluated(model)
    config = _config(Path(source))
    if shrink:
        config = _shrunk(config)
    for kind in (AutoModelForCausalLM, AutoModelForMaskedLM):
        if type(config) in kind._model_mapping:
            return _evaluated(kind.from_config(config, dtype=torch.float32))  # type: ignore[no-untyped-call]
    raise InputError(f"{config.model_type} has no language model in transformers; verify compares logits and loss.")


def compare(
    model: PreTrainedModel,
    mesh: Mesh,
    documents: list[int],
    *,
    seed: int = 0,
    schedule: str = "auto",
    advance: Callable[[], None] = lambda: None,
) -> Parity:
    """Runs the model alone and over the ranks of the mesh. Every rank calls it and comes to the same verdict.

    Args:
        model: the same weights on every rank; it is left as it was.
        documents: lengths of the documents of the sequence.
        schedule: by which attention is computed over the ranks.
        advance: called after each of three passes.

    Raises:
        UnsupportedError: `attach` refuses the model.
    """
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, (1, sum(documents)), generator=draw)
    alone = _alone(copy.deepcopy(model), tokens, documents)
    advance()
    ours = _sharded(copy.deepcopy(model), mesh, tokens, documents, schedule)
    advance()
    changed = tokens.clone()
    changed[0, documents[0] // 2] = (tokens[0, documents[0] // 2] + 1) % model.config.vocab_size
    different = _moved(model, mesh, ours, tokens, changed, documents, schedule)
    advance()
    return Parity(
        layers={name: _relative(x, alone.layers[name]) for name, x in ours.layers.items()},
        logits=_relative(ours.logits, alone.logits),
        loss=abs(ours.loss - alone.loss) / abs(alone.loss) if alone.loss else abs(ours.loss),
        gradients={name: _relative(x, alone.gradients[name]) for name, x in ours.gradients.items()},
        leaks=(documents[0] + different[documents[0] :].nonzero()[:, 0]).tolist(),
        moved=bool(different.any()),
    )


def _moved(
    model: PreTrainedModel, mesh: Mesh, ours: Run, tokens: Tensor, changed: Tensor, documents: list[int], schedule: str
) -> Tensor:
    """Which tokens' logits move with the changed token, ``[S]``: by any bit, or with experts by more than rounding.

    Experts take their tokens together, those of all documents, and round by how many they are: in float64, where that
    is less than any leak.
    """
    if not any(getattr(model.config, name, None) for name in EXPERTS):
        probed = _sharded(copy.deepcopy(model), mesh, changed, documents, schedule)
        return (probed.logits != ours.logits).flatten(2).any(2)[0]
    logits = []
    for each in (tokens, changed):
        wide = copy.deepcopy(model).double()
        wide.set_experts_implementation("eager")  # the others have no float64
        logits.append(_sharded(wide, mesh, each, documents, schedule).logits)
    return ((logits[0] - logits[1]).abs() > ROUNDING * logits[0].abs().max()).flatten(2).any(2)[0]


# -- the two runs ----------------------------------------------------------------------------------------------------


def _alone(model: PreTrainedModel, tokens: Tensor, documents: list[int]) -> Run:
    """Each document by itself."""
    layers: dict[str, list[Tensor]] = {}
    logits, losses = [], []
    with _outputs_of_attention(model, lambda name, x: layers.setdefault(name, []).append(x)):
        for part in tokens.split(documents, dim=1):
            found = model(input_ids=part, **_options(model)).logits
            logits.append(found)
            losses.append(_summed(found, part, shifted=_is_decoder(model)))
    loss = torch.stack(losses).sum() / max(1, _labels(documents, _is_decoder(model)))
    loss.backward()
    whole = {name: torch.cat(parts, dim=1) for name, parts in layers.items()}
    return Run(whole, torch.cat(logits, dim=1).detach(), loss.item(), _gradients(model))


def _sharded(model: PreTrainedModel, mesh: Mesh, tokens: Tensor, documents: list[int], schedule: str) -> Run:
    """All documents packed, over the ranks."""
    layers: dict[str, Tensor] = {}
    attached = attach(model, mesh, schedule=schedule)
    given = attached.batch(tokens, labels=tokens, document_lengths=documents)
    sharding = sharding_of(given)
    with _outputs_of_attention(model, layers.__setitem__):
        out = model(**given)
    out.loss.backward()
    sum_gradients(model, mesh)
    whole = {name: sharding.join(x, 1) for name, x in layers.items()}
    return Run(whole, sharding.join(out.logits.detach(), 1), float(total(out.loss, mesh)), _gradients(model))


@contextmanager
def _outputs_of_attention(model: nn.Module, take: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Hands on what every attention layer gives, ``[B, S, H]``, in the order in which they run."""

    def hook(name: str) -> Callable[..., None]:
        def taken(_module: nn.Module, _inputs: Any, output: Any) -> None:
            take(name, (output[0] if isinstance(output, tuple) else output).detach())

        return taken

    found = [(name, module) for name, module in model.named_modules() if _is_attention(module)]
    hooks = [module.register_forward_hook(hook(name)) for name, module in found]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def _is_attention(module: nn.Module) -> bool:
    """Whether transformers calls an attention function in this module: it has projections of its own."""
    named = any(kind.__name__.endswith("Attention") for kind in type(module).__mro__)
    return named and any(isinstance(each, nn.Linear) for each in module.children())


def _options(model: PreTrainedModel) -> dict[str, Any]:
    return {"use_cache": False} if _is_decoder(model) else {}


def _is_decoder(model: PreTrainedModel) -> bool:
    return bool(model.can_generate())


def _labels(documents: list[int], shifted: bool) -> int:
    return sum(documents) - len(documents) if shifted else sum(documents)


def _summed(logits: Tensor, tokens: Tensor, *, shifted: bool) -> Tensor:
    if shifted:
        logits, tokens = logits[:, :-1], tokens[:, 1:]
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="sum")


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _relative(x: Tensor, reference: Tensor) -> float:
    """‖x − reference‖ / ‖reference‖; infinite where one is not a number, or the reference is zero and x is not."""
    difference, norm = float((x - reference).double().norm()), float(reference.double().norm())
    if difference == 0:
        return 0.0
    return difference / norm if norm > 0 and math.isfinite(difference) else math.inf


# -- the model -------------------------------------------------------------------------------------------------------


def _made(source: str) -> object:
    """What the function makes, or a model that stands there."""
    found = imported("--model", source)
    if isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        return found()
    except Exception as error:
        raise InputError(f"--model {source} failed: {type(error).__name__}: {error}") from error


def _evaluated(model: Any) -> PreTrainedModel:
    """Without dropout: two runs of one model draw differently."""
    model.eval()
    return model  # type: ignore[no-any-return]


def _config(path: Path) -> Any:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"--model takes a config.json, a folder that has one, or module:function that makes a model; got {path}."
        )
    try:
        given = json.loads(file.read_text())
        return AutoConfig.for_model(**given)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{file} is no config of a transformers model: {' '.join(str(error).split())[:300]}"
        ) from error


def _shrunk(config: Any) -> Any:
    """The same architecture, small: its kinds of layers, and its ratio of query heads to key heads."""
    given = config.to_dict()
    ratio = max(1, config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or 1))
    found = {name: min(given[name], most) for name, most in SMALL.items() if isinstance(given.get(name), int)}
    heads = max(ratio, 4 // ratio * ratio) if ratio <= 4 else ratio
    found["num_attention_heads"] = min(heads, config.num_attention_heads)
    if isinstance(given.get("num_key_value_heads"), int):
        found["num_key_value_heads"] = max(1, found["num_attention_heads"] // ratio)
    if "hidden_size" in found:
        found["hidden_size"] = 16 * found["num_attention_heads"]
    kinds = given.get("layer_types")
    if kinds:
        kept = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
        found["layer_types"] = [kinds[i] for i in kept] + [kinds[kept[0]]]
        found["num_hidden_layers"] = len(found["layer_types"])
    else:
        found["num_hidden_layers"] = min(2, config.num_hidden_layers)
    if isinstance(given.get("sliding_window"), int):
        found["sliding_window"] = min(given["sliding_window"], 32)
    return type(config).from_dict({**given, **found})
