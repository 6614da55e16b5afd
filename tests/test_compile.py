"""parallel.compile: what auto means, its words in YAML, and a machine that cannot compile."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

from fitscale.config.load import load_config
from fitscale.config.schema import ParallelConfig
from fitscale.model.common.compiler import formula, is_compiled, lacks_for_compiling, use_compiler
from fitscale.parallel.groups import init_parallel
from fitscale.plan.layout import resolve_compile
from fitscale.train.start import choose_compiler

SHORT = ["configs/demo/digits.yaml", "configs/demo/s.yaml"]
LONG = ["configs/model/b.yaml", "configs/recipe/fitv2_256.yaml"]


@pytest.mark.parametrize(("configs", "on_cpu", "on_cuda"), [(SHORT, "off", "off"), (LONG, "on", "on")])
def test_auto_compiles_long_runs(configs, on_cpu, on_cuda):
    config = load_config(configs)
    assert config.parallel.compile == "auto"
    assert resolve_compile(config, on_cuda=False).parallel.compile == on_cpu
    assert resolve_compile(config, on_cuda=True).parallel.compile == on_cuda


@pytest.mark.parametrize("word", ["on", "off"])
def test_a_word_stays_as_given(tmp_path, word):
    file = tmp_path / "config.yaml"
    file.write_text(f"parallel:\n  compile: {word}\n")
    for given in (str(file), f"parallel.compile={word}"):
        for configs in (SHORT, LONG):
            assert resolve_compile(load_config([*configs, given]), on_cuda=True).parallel.compile == word


def test_a_machine_without_a_compiler_says_so_in_a_line_and_runs_as_written(monkeypatch, capsys, tmp_path, request):
    request.addfinalizer(lambda: use_compiler(False))
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    choose_compiler(ParallelConfig(compile="on"), init_parallel(ParallelConfig(), "cpu"))
    printed = capsys.readouterr().err
    assert not is_compiled()
    assert printed.count("\n") == 1 and printed.startswith("parallel.compile: there is no C++ compiler")
    assert "no-compiler" in printed


@pytest.mark.skipif(lacks_for_compiling(torch.device("cpu")) is not None, reason="needs g++ and Python.h")
@pytest.mark.parametrize(("word", "compiled"), [("on", True), ("off", False)])
def test_a_machine_with_one_says_nothing(word, compiled, capsys, request):
    request.addfinalizer(lambda: use_compiler(False))
    choose_compiler(ParallelConfig(compile=word), init_parallel(ParallelConfig(), "cpu"))
    assert is_compiled() == compiled
    assert capsys.readouterr().err == ""


def test_what_is_compiled_is_kept_in_a_folder_of_the_users_own(monkeypatch, tmp_path, request):
    request.addfinalizer(lambda: use_compiler(False))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "given")
    use_compiler(True)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "given"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    use_compiler(True)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / ".cache" / "fitscale" / "compiled")


@pytest.mark.skipif(lacks_for_compiling(torch.device("cpu")) is not None, reason="needs g++ and Python.h")
def test_nothing_that_is_compiled_lies_where_others_may_write(request):
    """Though importing megatron-core has torch choose such a folder; headers too, which g++ takes by name."""
    request.addfinalizer(lambda: use_compiler(False))
    use_compiler(True)
    assert formula(lambda x: 2 * x.sin())(torch.zeros(3)).tolist() == [0, 0, 0]
    own = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert list(own.glob("precompiled_headers/*.gch"))
    assert not list(Path(tempfile.gettempdir()).glob("torchinductor_*/**/*.*"))
