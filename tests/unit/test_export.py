"""`windlass export`: what Hugging Face reads is the model, and its tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ps.errors import MismatchError, StorageError
from ps.types import ParameterTable, TensorSpec
from tests.support.untrained import fresh_model, make_run, write_model
from workers.cli.main import main
from workers.data import kept
from workers.data.prepare import prepare
from workers.launch.folder import RunFolder
from workers.models import export, hugging_face, safetensors_file

CHINESE = "参数服务器把优化器的状态放在普通内存里。"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints of versions 20 and 40, and what a worker keeps in it."""
    text = "".join(f"Line {n}: {n * n} is the square of {n}. {CHINESE}\n" for n in range(2000))
    folder = make_run(tmp_path_factory.mktemp("export"), text, "model.num_layers=2", "model.rope_theta=5000")
    job = folder.read_job()
    write_model(folder, job.model_copy(update={"seed": 9}), 20)
    write_model(folder, job, 40)
    kept.keep(folder.path, prepare(job.data))
    return folder.path


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="needs the extra hf")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    return code, *capsys.readouterr()


def exported(run: Path, out: Path, *arguments: str) -> Path:
    assert main(["export", str(run), "--out", str(out), *arguments]) == 0
    return out


def test_transformers_computes_the_same_logits(run: Path, tmp_path: Path, transformers: Any) -> None:
    out = exported(run, tmp_path / "out")
    theirs = transformers.LlamaForCausalLM.from_pretrained(out)
    assert theirs.dtype is torch.float32
    assert theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()
    ours = fresh_model(RunFolder(run).read_job()).eval()
    tokens = torch.randint(0, ours.vocab_size, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=1e-5, atol=1e-6)


def test_transformers_reads_the_tokenizer_and_generates(run: Path, tmp_path: Path, transformers: Any) -> None:
    out = exported(run, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    original = prepare(RunFolder(run).read_job().data).tokenizer()
    for text in ("Line 7: 49 is  the\n\n square.", CHINESE, " naïve 🚀"):
        tokens = tokenizer(text)["input_ids"]
        assert tokens == original.encode(text).ids
        assert tokenizer.decode(tokens) == text
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    written = model.generate(**tokenizer("Line 7", return_tensors="pt"), max_new_tokens=8)
    assert tokenizer.decode(written[0]).startswith("Line 7")
    assert model.generation_config.eos_token_id == original.token_to_id("<|endoftext|>")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("float32", torch.float32),
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("fp32", torch.float32),
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
    ],
)
def test_every_dtype_is_the_master_weights_rounded_once(
    run: Path, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    tensors = load_file(exported(run, tmp_path / "out", "--dtype", name) / "model.safetensors")
    expected = {
        name: parameter.detach() for name, parameter in fresh_model(RunFolder(run).read_job()).named_parameters()
    }
    assert set(tensors) == set(expected)
    for key, tensor in tensors.items():
        assert tensor.dtype is dtype
        assert torch.equal(tensor, expected[key].to(dtype))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_a_checkpoint_is_chosen_by_its_name(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {}
    for name in ("step-20", "step-00000040"):
        out = exported(run, tmp_path / name, "--checkpoint", name)
        weights[name] = load_file(out / "model.safetensors")["model.embed_tokens.weight"]
    newest = load_file(exported(run, tmp_path / "newest") / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(weights["step-00000040"], newest)
    assert not torch.equal(weights["step-20"], newest)
    capsys.readouterr()
    for name, words in (("step-30", "step-00000020, step-00000040"), ("last", "step-N")):
        code, _, err = call(capsys, "export", str(run), "--out", str(tmp_path / "no"), "--checkpoint", name)
        assert code != 0
        assert words in err
        assert not (tmp_path / "no").exists()


def test_a_large_model_is_cut_into_files(run: Path, tmp_path: Path, transformers: Any) -> None:
    checkpoint = run / "checkpoints" / "step-00000040"
    done = export.export(run, checkpoint, tmp_path / "out", "float32", max_file_bytes=100_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 2
    assert files == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert index["metadata"]["total_size"] == 4 * done.num_parameters
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, parameter in fresh_model(RunFolder(run).read_job()).named_parameters():
        assert torch.equal(theirs[name], parameter)


def test_a_tensor_longer_than_a_piece_is_whole(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "_PIECE_ELEMENTS", 1000)
    tensors = load_file(exported(run, tmp_path / "out") / "model.safetensors")
    for name, parameter in fresh_model(RunFolder(run).read_job()).named_parameters():
        assert np.array_equal(tensors[name].numpy(), parameter.detach().numpy())


def test_a_folder_that_holds_something_is_not_touched(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    exported(run, out, "--dtype", "float16")
    capsys.readouterr()
    code, _, err = call(capsys, "export", str(run), "--out", str(out))
    assert code == 2
    assert "--force" in err
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    exported(run, out, "--force")
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    (out / "thesis.tex").write_text("years of work")
    capsys.readouterr()
    code, _, err = call(capsys, "export", str(run), "--out", str(out), "--force")
    assert code == 2
    assert "thesis.tex" in err
    assert (out / "thesis.tex").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_that_fails_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exported(run, tmp_path / "out", "--dtype", "float16")

    def fail(*_: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(export, "write_model", fail)
    capsys.readouterr()
    code, _, err = call(capsys, "export", str(run), "--out", str(tmp_path / "out"), "--force")
    assert (code, err) == (1, "windlass: error: the disk is full\n")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_checkpoint_is_not_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run" / "checkpoints" / "step-00000040"
    shutil.copytree(run / "checkpoints" / "step-00000040", copy)
    file = next(copy.glob("shard-00001*"))
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    code, _, err = call(capsys, "export", str(copy), "--out", str(tmp_path / "out"))
    assert code == 1
    assert str(file) in err
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_the_tokenizers_is_refused(run: Path) -> None:
    job = RunFolder(run).read_job()
    with pytest.raises(MismatchError, match=r"300 entries .* 299"):
        hugging_face.check_model(job, ParameterTable((TensorSpec(hugging_face.EMBEDDING, (299, 64)),)), 300)
    with pytest.raises(MismatchError, match="holds no"):
        hugging_face.check_model(job, ParameterTable((TensorSpec("w", (3,)),)), 300)
