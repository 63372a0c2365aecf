"""Reading a config.json so that no field that changes the maths is passed over in silence."""

from collections.abc import Collection
from typing import Any

from jaxlm.core.errors import ConfigError, whole

# Fields that say nothing about the forward pass of a decoder at inference.
IGNORED = frozenset("""
    _name_or_path add_cross_attention architectures attention_dropout auto_map bad_words_ids
    begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward
    classifier_dropout cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range
    is_decoder is_llama_config label2id length_penalty max_length min_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version
    transformers.js_config typical_p unk_token_id unsloth_fixed unsloth_version use_bfloat16
    use_cache name
""".split())

MISSING = object()
KINDS = {bool: "true or false", dict: "an object", list: "a list", str: "a text",
         int: "a whole number"}
LARGEST = 1e300  # a Python integer beyond the range of a float would overflow later


def _short(value: Any) -> str:
    """What came, cut to a line."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


class Fields:
    """A config.json, field by field; `finish` raises if a field with a value was never read."""

    def __init__(self, raw: dict[str, Any], where: str = "config.json"):
        if not isinstance(raw, dict):
            raise ConfigError(f"{where} holds {type(raw).__name__}; expected a JSON object")
        self.raw, self.where = raw, where
        self.read: set[str] = set()

    def take(self, name: str, default: Any = MISSING, kind: type | None = None) -> Any:
        """The value of a field; null counts as absent."""
        self.read.add(name)
        value = self.raw.get(name)
        if value is None:
            if default is MISSING:
                raise ConfigError(f"{self.where}: field {name!r} is missing; the model needs it")
            return default
        if kind is not None and (not isinstance(value, kind) or
                                 (isinstance(value, bool) and kind is not bool)):
            raise ConfigError(f"{self.where}: field {name!r} is {_short(value)}; expected "
                              f"{KINDS.get(kind, kind.__name__)}")
        return value

    def has(self, name: str) -> bool:
        """Whether the field is there, null included: some families tell null from absent."""
        return name in self.raw

    def count(self, name: str, default: Any = MISSING, most: int = 2**31 - 1) -> int:
        """A whole number of at least 1."""
        return whole(f"{self.where}: field {name!r}", self.take(name, default), high=most)

    def number(self, name: str, default: Any = MISSING) -> Any:
        """A finite number, or the default."""
        value = self.take(name, default)
        if value is not default and (
            isinstance(value, bool) or not isinstance(value, int | float)
            or not abs(value) <= LARGEST
        ):
            raise ConfigError(
                f"{self.where}: field {name!r} is {_short(value)}; expected a finite number"
            )
        return value

    def expect(self, name: str, *allowed: Any) -> None:
        """A field whose other values would change the maths."""
        value = self.take(name, allowed[0])
        if not any(value is one or (type(value) is type(one) and value == one) for one in allowed):
            raise ConfigError(
                f"{self.where}: field {name!r} is {value!r}, which this model cannot express; "
                f"supported: {', '.join(map(repr, allowed))}"
            )

    def finish(self, ignore: Collection[str] = ()) -> None:
        """Every field with a value was read, or is known not to matter."""
        for name, value in self.raw.items():
            # False is off for an unknown field; a switch that is on by default must be read
            off = value is None or value is False or value == [] or value == {}
            known = name in self.read | IGNORED or name.startswith("_attn_implementation")
            if not known and not off and name not in ignore:
                raise ConfigError(
                    f"{self.where}: field {name!r} = {value!r} is not known to jaxlm and may "
                    "change the maths; if you know that it does not, remove it, or, if it is of "
                    f"the file's first level, pass ignore_fields=[{name!r}] to jaxlm.load, or to a "
                    f"command --ignore-fields {name}"
                )
