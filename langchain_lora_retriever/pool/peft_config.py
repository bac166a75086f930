"""What a PEFT LoRA configuration says about each module, with PEFT's meaning and in bounded time."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import TYPE_CHECKING, Any

from peft import LoraConfig

from langchain_lora_retriever.errors import InvalidAdapterError, UnsupportedAdapterError
from langchain_lora_retriever.pool.checkpoint_files import CONFIG_FILE, MAX_BASE_MODEL_LENGTH
from langchain_lora_retriever.support.patterns import Pattern, PatternError, StepBudget
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["AdapterConfig"]

# Of matching patterns, for all modules of an adapter together: about a second. Usual patterns take 150 a module.
_MAX_STEPS = 500_000
_STEPS_PER_MODULE = 150
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_MAX_BITS = 1000  # of an integer that is to become a float
_LARGEST_RANK = 1 << 20

# Fields that may hold any value: they are supported here, or have done their work once training is over.
_FREE_FIELDS = {
    "alora_invocation_tokens", "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_dora", "use_rslora",
}  # fmt: skip
_KNOWN_AS = {
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "fan_in_fan_out": "transposed (Conv1D) weights",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "arrow_config": "Arrow routing",
    "modules_to_save": "fully trained modules",
    "bias": "trained biases",
    "lora_bias": "a bias of lora_B",
    "trainable_token_indices": "fully trained tokens",
    "target_parameters": "LoRA on parameters that are no modules, as a mixture's experts are",
    "layer_replication": "repeated layers",
}
_MERGE = "merge it into the base model (PeftModel.merge_and_unload) and serve that"
_LARGEST_TOKEN_ID = 1 << 31
_MAX_INVOCATION_TOKENS = 1024
_MAX_PARTS = 4  # of a field's name, among which the name of its switch is looked for
# These initialisations change the base model's weights, so the adapter is only right on the changed base.
_REBASING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

# What is read of a configuration, and handed to PEFT to be checked.
_USED_FIELDS = (
    "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "base_model_name_or_path", "use_dora", "alora_invocation_tokens",
    "ensure_weight_tying",
)  # fmt: skip
_NUMBERS = ("r", "lora_alpha")
# Of these PEFT has nothing to say, or not every version.
_OWN_FIELDS = ("alora_invocation_tokens", "ensure_weight_tying")


class AdapterConfig:
    """One checkpoint's configuration.

    Args:
        raw: The object in `adapter_config.json`.
        where: What to call the adapter in an error.

    Attributes:
        base_model: The base model it names, if any.
        is_dora: Whether each of its modules has a magnitude.
        invocation_tokens: Token ids from whose last occurrence on it is active; empty: from the first token on.
        recipe: Json of all that it says; the order of `target_modules` and `exclude_modules` alone does not count.

    Raises:
        UnsupportedAdapterError: If it asks for what is not supported here.
        InvalidAdapterError: If a value is not what PEFT would write.
    """

    def __init__(self, raw: object, where: str) -> None:
        if not isinstance(raw, dict):
            raise InvalidAdapterError(f"{where}: {CONFIG_FILE} holds a {type(raw).__name__}, not a JSON object.")
        _refuse_unsupported(raw, where)
        given = {key: raw[key] for key in _USED_FIELDS if key in raw and (raw[key] is not None or key in _NUMBERS)}
        _check_kinds(given, where)
        try:
            config = LoraConfig(**{key: value for key, value in given.items() if key not in _OWN_FIELDS})
        except Exception as error:  # whatever it is, it is PEFT's word on this configuration
            raise InvalidAdapterError(f"{where}: PEFT refuses {CONFIG_FILE}: {shown(error)}") from error
        self.base_model: str | None = given.get("base_model_name_or_path") or None
        self.is_dora: bool = given.get("use_dora", False)
        self.invocation_tokens: tuple[int, ...] = tuple(given.get("alora_invocation_tokens", ()))
        unordered = ("target_modules", "exclude_modules")
        self.recipe = json.dumps(
            {key: sorted(v) if key in unordered and isinstance(v, list) else v for key, v in raw.items()}
        )
        self._config = config
        self._ties_weights: bool = given.get("ensure_weight_tying", False)
        self._layers_pattern: list[str] = _as_list(config.layers_pattern)
        self._budget = StepBudget(_MAX_STEPS)
        self._known_targets: dict[str, bool] = {}
        try:
            self._targets = _compile(config.target_modules)
            self._excluded = _compile(config.exclude_modules)
            self._ranks = _Lookup(config.rank_pattern or {}, self._budget)
            self._alphas = _Lookup(config.alpha_pattern or {}, self._budget)
        except PatternError as error:
            raise _unmatched(error, where) from error

    @property
    def names_targets(self) -> bool:
        """Whether it says which modules it adapts, and does not leave that to the base model ("all-linear")."""
        return bool(self._config.target_modules) and self._config.target_modules != "all-linear"

    def is_target(self, module: str, where: str) -> bool:
        """Whether it names a module; False where it leaves that to the base model.

        Args:
            module: Path of the module in the base model.
            where: What to call the adapter in an error.

        Raises:
            InvalidAdapterError: If its patterns take too long to match.
        """
        if not self.names_targets:
            return False
        known = self._known_targets.get(module)
        if known is None:
            self._budget.allow(_STEPS_PER_MODULE)
            known = self._known_targets[module] = self._matched(where, self._is_target, module)
        return known

    def rank_and_scaling(self, module: str, where: str) -> tuple[int, float]:
        """Rank and scaling that PEFT would give a module.

        Args:
            module: Path of the module in the base model.
            where: What to call the adapter in an error.

        Raises:
            InvalidAdapterError: If the configuration does not name it, or gives it no rank or scaling that can be.

        Source: `peft.tuners.lora.LoraModel._create_and_replace` and `LoraLayer.update_layer`.
        """
        # A layer that is tied to a target is adapted by the same factors, and saved with it.
        if self.names_targets and not self._ties_weights and not self.is_target(module, where):
            raise InvalidAdapterError(
                f"{where}: the file adapts {module!r}, which target_modules={shown(self._config.target_modules)} does "
                "not name; PEFT would ignore it."
            )
        r = self._matched(where, self._ranks.get, module, self._config.r)
        alpha = self._matched(where, self._alphas.get, module, self._config.lora_alpha)
        if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= _LARGEST_RANK:
            raise InvalidAdapterError(f"{where}: rank {shown(r)} for {module!r} is not a positive integer.")
        if not _is_finite(alpha):
            raise InvalidAdapterError(f"{where}: lora_alpha {shown(alpha)} for {module!r} is not a finite number.")
        scaling = alpha / (math.sqrt(r) if self._config.use_rslora else r)
        return r, scaling

    def _matched(self, where: str, match: Any, *arguments: Any) -> Any:
        """What `match` gives; an error that names the adapter if its patterns take too long."""
        try:
            return match(*arguments, self._budget)
        except PatternError as error:
            raise _unmatched(error, where) from error

    def _is_target(self, module: str, budget: StepBudget) -> bool:
        """As `peft.tuners.tuners_utils.check_target_module_exists`."""
        if _names(self._excluded, module, budget):
            return False
        if isinstance(self._targets, Pattern) or module in self._targets:
            return _names(self._targets, module, budget)
        return _names(self._targets, module, budget) and self._is_in_layers(module)

    def _is_in_layers(self, module: str) -> bool:
        layers = self._config.layers_to_transform
        if layers is None or layers == []:
            return True
        # Neither ours nor a plain name makes `re` try anything twice.
        expressions = [rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in self._layers_pattern]
        matches = (re.match(expression, module) for expression in expressions or [r".*?\.[^.]*\.(?P<idx>\d+)\."])
        match = next(filter(None, matches), None)
        return match is not None and int(match["idx"]) in _as_list(layers)


def _unmatched(error: PatternError, where: str) -> InvalidAdapterError:
    return InvalidAdapterError(f"{where}: {CONFIG_FILE} has a pattern that cannot be matched: {error}.")


class _Lookup:
    """`rank_pattern` or `alpha_pattern`: the value of the first key that matches a module, as PEFT has it."""

    def __init__(self, values: Mapping[str, Any], budget: StepBudget) -> None:
        self._entries: list[tuple[str | Pattern, Any]] = []
        for key, value in values.items():
            if _NAME.fullmatch(key):
                budget.spend(1 + len(key) // 16)
                self._entries.append((key, value))
            else:
                budget.spend(100 + 8 * len(key))  # what parsing takes
                self._entries.append((Pattern(key, before=r"(.*\.)?(", after=")$"), value))

    def get(self, module: str, default: Any, budget: StepBudget) -> Any:
        budget.spend(1 + len(self._entries) // 4)
        for key, value in self._entries:
            if _is_suffix(key, module) if isinstance(key, str) else key.match(module, budget):
                return value
        return default


def _is_suffix(name: str, module: str) -> bool:
    r"""Whether `re.match(rf"(.*\.)?({name})$", module)` does; only dots mean more than themselves in a name."""
    before, tail = module[: -len(name)], module[-len(name) :]
    if before and before[-1] != ".":
        return False
    return tail == name or (
        len(tail) == len(name) and "." in name and all(a in {".", b} for a, b in zip(name, tail, strict=True))
    )


def _compile(modules: object) -> Pattern | frozenset[str]:
    return Pattern(modules) if isinstance(modules, str) else frozenset(_as_list(modules))


def _names(modules: Pattern | frozenset[str], module: str, budget: StepBudget) -> bool:
    if isinstance(modules, Pattern):
        return modules.fullmatch(module, budget)
    parts = module.split(".")
    budget.spend(len(parts))
    return any(".".join(parts[i:]) in modules for i in range(len(parts)))


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, str | int) else list(value)


def _is_finite(value: object) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return value.bit_length() <= _MAX_BITS
    return isinstance(value, float) and math.isfinite(value)


def _refuse_unsupported(raw: Mapping[str, Any], where: str) -> None:
    if raw.get("peft_type") != "LORA":
        raise UnsupportedAdapterError(
            f"{where}: peft_type is {shown(raw.get('peft_type'))}; only 'LORA' is supported. Train LoRA, turn it into "
            f"LoRA where PEFT can (peft.save_as_lora), or {_MERGE}."
        )
    fields = {field.name: field for field in dataclasses.fields(LoraConfig)}
    for key, value in raw.items():
        is_default = value == _default(fields.get(key)) or _says_nothing(key, value, fields, raw)
        if key not in _FREE_FIELDS and not is_default:
            also = f" ({_KNOWN_AS[key]})" if key in _KNOWN_AS else ""
            raise UnsupportedAdapterError(
                f"{where} needs {shown(key)[1:-1]}={shown(value)}{also}, which is not supported here. "
                f"Train it without, or {_MERGE}."
            )
    init = str(shown(raw.get("init_lora_weights", True))).lower().strip("'")
    if init.startswith(_REBASING_INITS):
        raise UnsupportedAdapterError(
            f"{where} has init_lora_weights={init!r}, which changes the base model's weights. Save it again "
            "with save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes it plain LoRA."
        )


def _says_nothing(key: str, value: object, fields: Mapping[str, Any], raw: Mapping[str, Any]) -> bool:
    """Whether a field is empty or off; of one that PEFT does not know yet, whether its own fields or its switch are.

    Every configuration that PEFT writes has a `qalora_group_size`, which means nothing where `use_qalora` is false.
    """
    nothing: tuple[object, ...] = (None, False, "", [], {})
    if key not in fields and isinstance(value, dict) and all(part in nothing for part in value.values()):
        return True
    return value in nothing or (key not in fields and _is_switched_off(key, raw))


def _is_switched_off(key: str, raw: Mapping[str, Any]) -> bool:
    parts = key.split("_", _MAX_PARTS)
    switches = ("use_" + "_".join(parts[:num]) for num in range(1, len(parts)))
    return any(raw.get(switch, True) in (None, False) for switch in switches)


def _default(field: dataclasses.Field[Any] | None) -> Any:
    return None if field is None or field.default is dataclasses.MISSING else field.default


def _check_kinds(given: Mapping[str, Any], where: str) -> None:
    """Refuse values of another kind than PEFT writes; numbers are looked at where they are used."""

    def is_name(value: object) -> bool:
        return isinstance(value, str)

    def is_plain_name(value: object) -> bool:
        return isinstance(value, str) and _NAME.fullmatch(value) is not None

    def is_layer(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    def each(check: Any) -> Any:
        return lambda value: check(value) or (isinstance(value, list) and all(map(check, value)))

    allowed: dict[str, tuple[Any, str]] = {
        "target_modules": (each(is_name), "a string or a list of strings"),
        "exclude_modules": (each(is_name), "a string or a list of strings"),
        "layers_to_transform": (each(is_layer), "an integer or a list of integers"),
        "layers_pattern": (each(is_plain_name), "a name or a list of names, of letters, digits, dots, _ and -"),
        "rank_pattern": (lambda value: isinstance(value, dict), "an object"),
        "alpha_pattern": (lambda value: isinstance(value, dict), "an object"),
        "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
        "use_dora": (lambda value: isinstance(value, bool), "true or false"),
        "ensure_weight_tying": (lambda value: isinstance(value, bool), "true or false"),
        "alora_invocation_tokens": (
            lambda value: (
                isinstance(value, list)
                and len(value) <= _MAX_INVOCATION_TOKENS
                and all(is_layer(token) and 0 <= token < _LARGEST_TOKEN_ID for token in value)
            ),
            f"a list of up to {_MAX_INVOCATION_TOKENS} token ids",
        ),
        "base_model_name_or_path": (
            lambda value: is_name(value) and len(value) <= MAX_BASE_MODEL_LENGTH and value.isprintable(),
            f"a string of up to {MAX_BASE_MODEL_LENGTH} printable characters",
        ),
    }
    for key, (is_allowed, what) in allowed.items():
        if key in given and not is_allowed(given[key]):
            raise InvalidAdapterError(f"{where}: {CONFIG_FILE} has {key}={shown(given[key])}; allowed is {what}.")
