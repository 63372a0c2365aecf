"""Lines to tokens and weights; what is wrong with a file is said with its line."""

import copy
import json
import signal

import numpy as np
import pytest

from jaxlm.core.errors import DataError
from jaxlm.hf.bundle import load
from jaxlm.train import Data, data, setup
from jaxlm.train.data import Reader, open_examples
from jaxlm.train.setup import reader
from jaxlm.train.stopping import Stopped, listening
from tests.tiny import BOS, EOS, write_folder
from tests.train.small import write

TEMPLATE = ("{{ bos_token }}{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{{ eos_token }}"
            "\n{% endfor %}{% if add_generation_prompt %}[a]{% endif %}")


@pytest.fixture(scope="module")
def read(bundle):
    return Reader(bundle.tokenizer, end_id=EOS)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A model whose tokenizer has a chat template."""
    folder = write_folder(tmp_path_factory.mktemp("chat") / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    return load(folder)


def learnt(example, tokenizer):
    """The text of the tokens that weigh something."""
    return tokenizer.decode(example.tokens[example.weights > 0], special=True)


def test_a_completion_is_learnt_and_its_prompt_is_not(read, bundle):
    example = read({"prompt": "2+2=", "completion": "four"})
    assert bundle.tokenizer.decode(example.tokens) == "2+2=four"
    assert learnt(example, bundle.tokenizer) == "four</s>"
    assert example.tokens[-1] == EOS and example.weights.dtype == np.float32


def test_of_a_text_everything_is_learnt_but_its_first_token(read, bundle):
    assert learnt(read({"text": "abc"}), bundle.tokenizer) == "bc</s>"


def test_an_end_that_the_tokenizer_adds_is_learnt_too(bundle):
    """And there is one of it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(bundle.tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS)])
    for record, wanted in (({"prompt": "2+2=", "completion": "four"}, "four</s>"),
                           ({"text": "abc"}, "bc</s>")):
        example = Reader(tokenizer, end_id=EOS)(record)
        assert learnt(example, tokenizer) == wanted
        assert list(example.tokens).count(EOS) == 1


def test_with_loss_on_all_a_prompt_is_learnt_too(bundle):
    example = Reader(bundle.tokenizer, answers=False, end_id=EOS)(
        {"prompt": "ab", "completion": "c"})
    assert learnt(example, bundle.tokenizer) == "bc</s>"


def test_of_a_chat_each_answer_is_learnt_with_its_end(chat):
    read = reader(chat, settings_of())
    example = read({"messages": [
        {"role": "system", "content": "S"}, {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"}, {"role": "user", "content": "hm"},
        {"role": "assistant", "content": "no"}]})
    whole = "<s>[s]S</s>\n[u]hi</s>\n[a]yes</s>\n[u]hm</s>\n[a]no</s>\n"
    assert chat.tokenizer.decode(example.tokens, special=True) == whole
    assert learnt(example, chat.tokenizer) == "yes</s>no</s>"
    assert list(example.tokens).count(BOS) == 1


def settings_of(**data):
    from jaxlm.train import Config

    return Config(data=Data(**data))


def test_a_template_may_come_from_a_file(bundle, tmp_path):
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    read = reader(bundle, settings_of(chat_template=str(tmp_path / "t.jinja")))
    found = read({"messages": [{"role": "user", "content": "a"},
                               {"role": "assistant", "content": "b"}]})
    assert learnt(found, bundle.tokenizer) == "b</s>"


def test_without_a_template_messages_are_refused_with_the_remedy(read, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": "assistant", "content": "b"}]}])
    with pytest.raises(DataError, match=r"a.jsonl:1: .*chat template.*chat_template: FILE"):
        open_examples([path], read, 8)


def test_a_template_that_rewrites_earlier_turns_is_refused(bundle, tmp_path):
    """As those do that drop a turn's thoughts once another follows."""
    template = ("{% for m in messages %}[{{ m.role[0] }}]{% if loop.last %}!{% endif %}"
                "{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}")
    read = Reader(bundle.tokenizer, template=template)
    turn = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]
    path = write(tmp_path / "a.jsonl", [{"messages": turn * 2}])
    with pytest.raises(DataError, match=r"a.jsonl:1: the chat template writes the turns before"):
        open_examples([path], read, 8)


@pytest.mark.parametrize(("line", "said"), [
    ("{", "is not JSON"), ("[1]", "is list; expected"), ('{"txt": "a"}', r"is \['txt'\]; expected"),
    ('{"text": 3}', "'text' is int; expected a string"),
    ('{"prompt": "a", "completion": null}', "'completion' is NoneType"),
    ('{"prompt": "a"}', r"is \['prompt'\]; expected"),
    ('{"messages": []}', '"messages" is no list'), ('{"messages": [{"role": "user"}]}', "no list"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "no message has the role 'assistant'"),
    ('{"text": "a", "prompt": "b"}', "expected"),
    ('{"prompt": "a", "complation": "b"}', "is 'complation' meant to be 'completion'"),
    ('{"text": "a", ', "at column 14"), ('{"text": "a', "at column 10"),
    ('{"text": "\\ud800"}', "surrogate"),
    ("null", "NoneType"),
])
def test_a_malformed_line_is_named(read, tmp_path, line, said):
    path = write(tmp_path / "a.jsonl", [{"text": "fine"}, "", line, {"text": "fine"}])
    with pytest.raises(DataError, match=rf"a.jsonl:3.*{said}"):
        open_examples([path], read, 8)


def test_what_is_no_text_is_named(read, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2 is not UTF-8"):
        open_examples([path], read, 8)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file_is_refused(read, tmp_path, text):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"a.jsonl:1: the file is empty"):
        open_examples([tmp_path / "a.jsonl"], read, 8)
    with pytest.raises(DataError, match="cannot read .*b.jsonl"):
        open_examples([tmp_path / "b.jsonl"], read, 8)


def test_a_long_sample_meets_the_policy_and_is_counted(read, tmp_path):
    path = write(tmp_path / "a.jsonl", [
        {"text": "abc"}, {"text": "abcdefghij"}, {"prompt": "abcdefghij", "completion": "k"}])
    cut = open_examples([path], read, 5, "cut")
    assert cut.counts == {"samples": 3, "cut": 1, "skipped": 1, "tokens": 4 + 6}
    assert cut.lengths.tolist() == [4, 6, 0]  # of the third, nothing to learn would be left
    assert len(cut[1].tokens) == 6
    skip = open_examples([path], read, 5, "skip")
    assert skip.counts["skipped"] == 2 and skip.lengths.tolist() == [4, 0, 0]
    with pytest.raises(DataError, match=r"a.jsonl:2 has 11 tokens; a row holds 6"):
        open_examples([path], read, 5, "error")
    with pytest.raises(DataError, match="all 3 samples"):
        open_examples([path], read, 2, "skip")


def test_other_fields_are_not_read_and_said_once(read, tmp_path):
    lines = [{"text": "abc"}, {"prompt": "a", "completion": "b"}]
    plain = open_examples([write(tmp_path / "a.jsonl", lines)], read, 8)
    more = [line | {"id": 1, "source": None} for line in lines] + [{"text": "d", "id": 2}]
    with pytest.warns(UserWarning, match=r"'id' \(lines: 3\), 'source' \(lines: 2\)") as said:
        found = open_examples([write(tmp_path / "b.jsonl", more)], read, 8)
    assert len(said) == 1 and len(found) == 3
    for i in range(2):
        np.testing.assert_array_equal(found[i].tokens, plain[i].tokens)
        np.testing.assert_array_equal(found[i].weights, plain[i].weights)


def test_messages_are_a_sample_beside_any_other_field(chat):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    example = reader(chat, settings_of())({"messages": turns, "prompt": "a", "prompt_id": "x"})
    assert learnt(example, chat.tokenizer) == "b</s>"


def test_lines_tokenised_together_are_those_of_each_alone(chat, tmp_path, monkeypatch):
    """Chats, whose marks are in the text, among texts, whose marks the tokenizer adds."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
    lines = [{"text": "abc"}, {"messages": turns}, {"prompt": "2+2=", "completion": "4"}] * 3
    read = reader(chat, settings_of())
    monkeypatch.setattr(data, "CHUNK", 4)
    found = open_examples([write(tmp_path / "a.jsonl", lines)], read, 64)
    assert found.counts["samples"] == len(found.cache) == 9
    for i, line in enumerate(lines):
        for ours, alone in zip(found[i], read(line), strict=True):
            np.testing.assert_array_equal(ours, alone)


def test_lines_are_watched_and_a_sigterm_ends_the_reading(read, tmp_path):
    path, seen = write(tmp_path / "a.jsonl", [{"text": "abc"}] * 5), []

    def watch(numbers):
        for number in setup.line_by_line(numbers):
            seen.append(number)
            if number == 2:
                signal.raise_signal(signal.SIGTERM)
            yield number

    with pytest.raises(Stopped, match="the same command goes on"), listening():
        open_examples([path], read, 8, watch=watch)
    assert seen == [0, 1, 2]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
