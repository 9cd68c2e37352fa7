"""Any model class of torchmil as a head, by name: `torchmil:ABMIL`, `torchmil:SETMIL`, ... where torchmil is installed.

torchmil's models answer one yes-or-no question by one logit y. As a head:

    2 classes   logits (0, y): their softmax is (1 - sigmoid(y), sigmoid(y)), their cross-entropy torchmil's own loss
    1 output    logits (y,), for a value or a log-risk
    C classes   the layer that gives y is made C wide; a model whose own losses know two classes only is refused

What a model's loss has beyond that (instance losses, KL, cut losses; `compute_loss` of torchmil) is added for two
classes exactly as torchmil adds it up. Its `predict` is what counts in eval mode, where that differs from `forward`.

What a model asks for is read off its signature: X (the bag), coords (columns and rows, found from the positions of the
instances) and adj (neighbours on that grid, sparse, weighted by degree). Models that need anything else are refused by
name. A model is tried on a small bag when it is built, so that one that does not fit is refused before training.

torchmil: Castro-Macías et al., a library for deep multiple instance learning, Apache-2.0. Nothing of it is copied here.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict
from torch import Tensor, nn

from lrmil.errors import HeadError
from lrmil.mil.base import HeadOutput, MILHead
from lrmil.mil.card import HeadCard
from lrmil.mil.label import class_index
from lrmil.mil.positions import grid_positions, neighbour_edges
from lrmil.settings import Settings

PREFIX = "torchmil:"

_GIVEN = ("X", "coords", "adj")
"""Inputs that a bag and its positions provide"""
_OURS = ("in_shape", "in_dim", "feat_ext", "criterion")
"""Constructor arguments that are not options"""
_REFUSED = {
    "MILModel": "is the base of models, not a model",
    "MILModelWrapper": "wraps models, and is none itself",
    "DTFDMIL": "deals instances into groups at random in prediction too, so a slide has no one answer; use dtfd",
    "IIBMIL": "needs its prototypes updated between epochs, which only its own training loop does",
}
_NO_ATTENTION = {"TransMIL"}
"""Its attention is a row of a Nystrom approximation: neither a pooling weight nor bound to be positive"""
_PROBE_SIDE = 3


class TorchmilOptions(Settings):
    """Constructor arguments of the model, as they are called there; `create` checks their names."""

    model_config = ConfigDict(extra="allow")


@dataclass(frozen=True)
class _Findings:
    """What a trial on a small bag has shown."""

    attention: Literal["logits", "weights"] | None
    own_losses: bool
    own_predict: bool
    random: bool
    """Prediction draws from torch's generator"""


class TorchmilHead(MILHead):
    """See the top of this file. Gives neither `bag_feature` nor `hidden`; attention where the model returns one a bag.

    In eval mode the generator is fixed for models that sample, so that a slide has one answer.
    """

    Options = TorchmilOptions
    options: TorchmilOptions

    def __init__(self, in_dim: int, num_classes: int, options: TorchmilOptions, name: str) -> None:
        super().__init__(in_dim, num_classes, options)
        self.model_name = name
        chosen = dict(options.model_extra or {})
        self.model = _construct(name, model_class(name), in_dim, chosen)
        with _on_the_side():
            self._findings = self._try()
        if num_classes > 2:
            self._widen()

    def score(self, bag: Tensor, *, label: Tensor | None, coords: Tensor | None) -> HeadOutput:
        """Ask the model; its own losses are added where a label is given and they are defined."""
        try:
            return self._score(bag, label, coords)
        except (HeadError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise HeadError(
                f"{PREFIX}{self.model_name} fails on a bag of {len(bag)} instances: {type(error).__name__}: {error}",
                fix="It may need other options, or larger bags; see torchmil's documentation of that model.",
            ) from error

    def _score(self, bag: Tensor, label: Tensor | None, coords: Tensor | None) -> HeadOutput:
        found = self._findings
        inputs = self._inputs(bag, coords, needs_graph=label is not None and found.own_losses)
        losses: dict[str, Tensor] = {}
        fixed = _fixed_generator(bag) if found.random and not self.training else nullcontext()
        with fixed:
            answer, attention = self._forward(inputs)
            if label is not None and found.own_losses:
                answer, losses = self._losses(inputs, label)
            elif found.own_predict and not self.training:
                answer = self.model.predict(**_accepted(self.model.predict, inputs), return_inst_pred=False)
        weights, scores = self._attention(attention, len(bag))
        return HeadOutput(self._logits(answer), attention=weights, attention_logits=scores, losses=losses)

    @property
    def gives_attention(self) -> bool:
        """Whether `HeadOutput.attention` is there."""
        return self._findings.attention is not None

    def _forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        given = _accepted(self.model.forward, inputs)
        if self._findings.attention is None:
            return self.model(**given), None
        return self.model(**given, return_att=True)

    def _losses(self, inputs: dict[str, Tensor], label: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the logit and the terms that, beside the bag's cross-entropy, give the sum torchmil would minimise."""
        target = torch.full((1,), class_index(label, 2), device=label.device)
        answer, terms = self.model.compute_loss(target, **_accepted(self.model.compute_loss, inputs))
        losses = {f"torchmil_{name}": value for name, value in terms.items()}
        # torchmil's terms hold a loss of the bag already: take out the one that whoever trains the head will add.
        cross_entropy = F.cross_entropy(self._logits(answer)[None], target)
        return answer, losses | {"counted_twice": -cross_entropy}

    def _logits(self, answer: Tensor) -> Tensor:
        values = answer.reshape(-1).float()
        wanted = self.num_classes if self.num_classes > 2 else 1
        if len(values) != wanted:
            raise HeadError(f"{PREFIX}{self.model_name} gives {len(values)} logits where {wanted} were expected.")
        return torch.cat([torch.zeros_like(values), values]) if self.num_classes == 2 else values

    def _attention(self, found: Tensor | None, count: int) -> tuple[Tensor | None, Tensor | None]:
        """Return attention weights and logits (N,)."""
        if found is None:
            return None, None
        values = found.reshape(-1).float()
        if len(values) != count:
            raise HeadError(f"{PREFIX}{self.model_name} gives {len(values)} attention values for {count} instances.")
        if self._findings.attention == "weights":
            # Some weight may have gone elsewhere, to a class token or to empty places of the grid.
            values = torch.log(values.clamp_min(torch.finfo(torch.float32).tiny))
        return torch.softmax(values, dim=0), values

    def _inputs(self, bag: Tensor, coords: Tensor | None, *, needs_graph: bool) -> dict[str, Tensor]:
        """Return what the model may be given, each with a batch axis of one."""
        inputs = {"X": bag[None]}
        parameters = inspect.signature(self.model.forward).parameters
        asked = [name for name in ("coords", "adj") if name in parameters]
        if not asked:
            return inputs
        if coords is None:
            if needs_graph or any(parameters[name].default is inspect.Parameter.empty for name in asked):
                raise HeadError(
                    f"{PREFIX}{self.model_name} needs to know where the instances lie, and the bag has no coords.",
                    fix="Give features with coordinates, or choose a head that does without.",
                )
            return inputs
        cells = grid_positions(coords.detach().cpu().numpy())
        if "coords" in asked:
            inputs["coords"] = torch.from_numpy(cells)[None].to(bag.device)
        if "adj" in asked:
            edges, weights = neighbour_edges(cells)
            index = torch.cat([torch.zeros(1, edges.shape[1], dtype=torch.int64), torch.from_numpy(edges)])
            size = (1, len(bag), len(bag))
            adj = torch.sparse_coo_tensor(index, torch.from_numpy(weights), size, check_invariants=False)
            inputs["adj"] = adj.to(bag.device).coalesce()
        return inputs

    def _try(self) -> _Findings:
        """Run a copy of the model on a small bag and see what it gives."""
        model, name = copy.deepcopy(self.model), self.model_name
        forward = inspect.signature(model.forward).parameters
        unknown = [p for p in _required(forward) if p not in _GIVEN]
        if unknown:
            raise HeadError(
                f"{PREFIX}{name} needs {', '.join(unknown)} of every bag, which there is not.", fix="Choose another."
            )
        coords = _square(_PROBE_SIDE)
        bags = [self._inputs(torch.randn(len(coords), self.in_dim), coords, needs_graph=True) for _ in range(3)]

        def answer(function: Callable[..., Any], inputs: dict[str, Tensor], **more: bool) -> Tensor:
            torch.manual_seed(0)
            return _first(function(**_accepted(function, inputs), **more))

        try:
            model.eval()
            with torch.no_grad():
                same = torch.equal(_first(model(**_accepted(model.forward, bags[0]))), answer(model.forward, bags[0]))
                repeatable = torch.equal(answer(model.forward, bags[0]), answer(model.forward, bags[0]))
                predicted = answer(model.predict, bags[0], return_inst_pred=False)
                differs = not torch.allclose(predicted, answer(model.forward, bags[0]), atol=1e-5)
                attention = []
                if _has_att(name, forward):
                    attention = [model(**_accepted(model.forward, b), return_att=True)[1] for b in bags]
            model.train()
            _, terms = model.compute_loss(torch.ones(1, dtype=torch.int64), **_accepted(model.compute_loss, bags[0]))
        except Exception as error:
            raise HeadError(
                f"{PREFIX}{name} cannot be run on a small bag: {type(error).__name__}: {error}",
                fix=f"It may need options; it has: {', '.join(_option_names(type(model))) or 'none'}.",
            ) from error
        own_losses = len(terms) > 1
        if own_losses and self.num_classes != 2:
            raise HeadError(
                f"{PREFIX}{name} has losses of its own ({', '.join(terms)}) for two classes; it cannot be used for "
                f"{self.num_classes} outputs.",
                fix="Choose one of lrmil's own heads.",
            )
        if not repeatable:
            raise HeadError(
                f"{PREFIX}{name} answers the same bag differently each time, whatever torch's seed.",
                fix="Choose another head.",
            )
        return _Findings(_kind(attention), own_losses, own_predict=differs, random=not same)

    def _widen(self) -> None:
        """Give the layer that makes the logit one output a class, and see that each class has a logit of its own."""
        with _on_the_side():
            inputs = self._inputs(torch.randn(_PROBE_SIDE**2, self.in_dim), _square(_PROBE_SIDE), needs_graph=False)
            place = _last_layer(self.model, lambda model: model(**_accepted(model.forward, inputs)))
        if place is not None:
            old = self.model.get_submodule(place)
            assert isinstance(old, nn.Linear)
            parent, _, own = place.rpartition(".")
            wide = nn.Linear(old.in_features, self.num_classes, bias=old.bias is not None)
            setattr(self.model.get_submodule(parent), own, wide)
            if self._one_row_a_class(inputs, wide):
                return
        raise HeadError(
            f"{PREFIX}{self.model_name} answers yes or no; it cannot be widened to {self.num_classes} classes.",
            fix="Choose one of lrmil's own heads.",
        )

    def _one_row_a_class(self, inputs: dict[str, Tensor], layer: nn.Linear) -> bool:
        with _on_the_side():
            model = copy.deepcopy(self.model)  # running statistics of norms stay as they are
            weight = next(c for m, c in zip(self.model.modules(), model.modules(), strict=True) if m is layer).weight
            answer = _first(model(**_accepted(model.forward, inputs))).reshape(-1)
            if len(answer) != self.num_classes:
                return False
            rows = [torch.autograd.grad(a, weight, retain_graph=True)[0].abs().sum(1) > 0 for a in answer]
            return torch.equal(torch.stack(rows), torch.eye(self.num_classes, dtype=torch.bool))


def create(name: str, in_dim: int, num_classes: int, **options: Any) -> TorchmilHead:
    """Build the head `name`, which begins with `torchmil:`; see `create_head`.

    Raises:
        HeadError: torchmil is not installed, has no such model, or the model needs what there is not.
    """
    model = name.removeprefix(PREFIX)
    known = _option_names(model_class(model))
    for option in options:
        if option not in known:
            raise HeadError(f"head {name!r} has no option {option!r}.", fix=f"Its options are: {', '.join(known)}.")
    head = TorchmilHead(in_dim, num_classes, TorchmilOptions(**options), model)
    head.card = _card(model, gives_attention=head.gives_attention)
    return head


def card(name: str) -> HeadCard:
    """Return the card of the head `name`, which begins with `torchmil:`, by the signature of the model alone.

    Raises:
        HeadError: see `create`.
    """
    model = name.removeprefix(PREFIX)
    return _card(model, _has_att(model, inspect.signature(model_class(model).forward).parameters))


def names() -> tuple[str, ...]:
    """Return the names of all models that this torchmil has and a head can be made of; empty without torchmil."""
    try:
        models = _torchmil()
    except HeadError:
        return ()
    return tuple(PREFIX + name for name in _model_names(models) if name not in _REFUSED and _buildable(models, name))


def model_class(name: str) -> type[nn.Module]:
    """Return the class `name` of torchmil.models.

    Raises:
        HeadError: torchmil is not installed, has no such model, or no head can be made of it.
    """
    models = _torchmil()
    if name not in _model_names(models):
        raise HeadError(
            f"torchmil has no model named {name!r}.", fix=f"Choose one of: {', '.join(n for n in names())}."
        )
    if name in _REFUSED:
        raise HeadError(f"{PREFIX}{name} {_REFUSED[name]}.", fix=f"Choose one of: {', '.join(names())}.")
    return getattr(models, name)


def _torchmil() -> ModuleType:
    try:
        return importlib.import_module("torchmil.models")
    except ImportError as error:
        raise HeadError(
            f"a head named {PREFIX}... needs torchmil, which cannot be imported ({error}).",
            fix="Run `pip install 'lrmil[torchmil]'`, or choose one of lrmil's own heads.",
        ) from error


def _model_names(models: ModuleType) -> list[str]:
    return sorted(n for n, v in vars(models).items() if inspect.isclass(v) and issubclass(v, nn.Module))


def _buildable(models: ModuleType, name: str) -> bool:
    return not [p for p in _required(inspect.signature(getattr(models, name)).parameters) if p not in _OURS[:2]]


def _option_names(model: type) -> list[str]:
    return [n for n in inspect.signature(model).parameters if n not in _OURS]


def _card(model: str, gives_attention: bool) -> HeadCard:
    return HeadCard(
        name=PREFIX + model,
        title=f"{model} of torchmil",
        citation="Castro-Macías et al., torchmil; the method's own paper is named in torchmil's documentation",
        licence_note="torchmil: Apache-2.0, used as installed",
        gives_attention=gives_attention,
    )


def _construct(name: str, model: type[nn.Module], in_dim: int, options: dict[str, Any]) -> Any:
    parameters = inspect.signature(model).parameters
    size: dict[str, Any] = {"in_shape": (in_dim,), "in_dim": in_dim}
    given = {key: value for key, value in size.items() if key in parameters}
    missing = [p for p in _required(parameters) if p not in given and p not in options]
    if missing:
        raise HeadError(
            f"{PREFIX}{name} must be built with {', '.join(missing)}, which no config can give.",
            fix=f"Choose one of: {', '.join(names())}.",
        )
    try:
        return model(**given, **options)
    except Exception as error:
        raise HeadError(
            f"{PREFIX}{name} cannot be built: {type(error).__name__}: {error}",
            fix=f"Its options are: {', '.join(_option_names(model)) or 'none'}.",
        ) from error


def _required(parameters: Any) -> list[str]:
    fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [n for n, p in parameters.items() if p.default is p.empty and p.kind not in fixed and n != "self"]


def _accepted(function: Callable[..., Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in inputs.items() if name in parameters}


def _has_att(name: str, forward: Any) -> bool:
    return "return_att" in forward and name not in _NO_ATTENTION


def _first(answer: Any) -> Tensor:
    return answer[0] if isinstance(answer, tuple) else answer


def _kind(attention: list[Tensor]) -> Literal["logits", "weights"] | None:
    """Say what a model calls attention on some bags: scores before a softmax, weights after one, or nothing (zeros)."""
    if not any(bool(found.any()) for found in attention):
        return None
    # A class token may have taken a part of the weights. Scores are hardly ever parts of a whole on every bag.
    whole = [bool((found >= 0).all()) and 0.5 < float(found.sum()) < 1 + 1e-4 for found in attention]
    return "weights" if all(whole) else "logits"


def _last_layer(model: nn.Module, call: Callable[[nn.Module], Any]) -> str | None:
    """Return the name of the linear layer whose one output is the answer of the model."""
    seen: dict[str, Tensor] = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == 1}
    hooks = [
        m.register_forward_hook(lambda _m, _i, out, n=n: seen.__setitem__(n, out.detach().reshape(-1)))
        for n, m in layers.items()
    ]
    try:
        answer = _first(call(model)).detach().reshape(-1)
    finally:
        for hook in hooks:
            hook.remove()
    return next((n for n, out in seen.items() if out.shape == answer.shape and torch.equal(out, answer)), None)


def _square(side: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(side), torch.arange(side))


@contextmanager
def _on_the_side() -> Iterator[None]:
    """Leave torch's generator on the CPU as it was, and allow gradients whatever surrounds the call."""
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        yield


@contextmanager
def _fixed_generator(bag: Tensor) -> Iterator[None]:
    devices = [bag.device] if bag.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield
