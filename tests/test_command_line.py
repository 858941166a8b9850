import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import command_line
import config
from command_line import parse_constants
from errors import InputError, RunError


def test_every_constant_except_the_derived_is_a_flag_with_its_comment_as_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_constants(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    found = command_line.constants_with_comments()
    assert set(found) == {name for name in vars(config) if name.isupper()}
    for name, (_, comment) in found.items():
        if name in command_line.DERIVED:
            assert command_line.flag(name) + " " not in text
        else:
            assert comment and command_line.flag(name) in text and " ".join(comment.split()) in text, name


def test_flags_override_config_and_derived_constants_follow():
    c, given = parse_constants(["--batch-size", "32", "--num-frames", "8", "--flip", "--lambda-gp=0"])
    assert (c.BATCH_SIZE, c.NUM_FRAMES, c.FLIP, c.LAMBDA_GP) == (32, 8, True, 0.0)
    assert c.TRANSFORMER_IN_CHANNELS == 8 * c.CHANNELS
    assert given == {"BATCH_SIZE", "NUM_FRAMES", "FLIP", "LAMBDA_GP"}
    assert c.STEPS == config.STEPS


@pytest.mark.parametrize("argv, words", [
    (["--balance-classes"], ["--balance-classes needs --folders classes"]),
    (["--image-size", "100"], ["--image-size 100 is invalid: must be one of 32, 48, 64", "512"]),
    (["--image-size", "big"], ["--image-size", "big"]),
    (["--channels", "2"], ["--channels 2", "1, 3 or 4"]),
    (["--batch-siz", "3"], ["--batch-siz"]),
    (["--batch-size", "0"], ["--batch-size 0", "above 0"]),
    (["--lambda-gp", "nan"], ["--lambda-gp nan"]),
    (["--learning-rate", "inf"], ["--learning-rate inf"]),
    (["--learning-rate", "-1"], ["--learning-rate -1", "above 0"]),
    (["--patch", "10"], ["--patch 10", "4, 8, 16"]),
    (["--image-size", "48", "--patch", "32"], ["--patch 32", "--image-size 48", "4, 8, 12, 16"]),
    (["--transformer-dim", "100"], ["--transformer-dim 100", "96 or 108"]),
    (["--run", "../up"], ["--run ../up"]),
    (["--run", "x" * 201], ["--run", "200 bytes"]),
    (["--run", "\u96ea" * 70], ["--run", "200 bytes"]),           # 210 bytes
    (["--batch-size", "12", "--micro-batch", "5"], ["--micro-batch 5", "--batch-size 12", "1, 2, 3, 4, 6, 12"]),
    (["--micro-batch", "-1"], ["--micro-batch -1", "0 or more"]),
    (["--decay-from-kimg", "80"], ["--decay-to-kimg 0", "above --decay-from-kimg 80"]),
    (["--decay-from-kimg", "80", "--decay-to-kimg", "40"], ["--decay-to-kimg 40", "above --decay-from-kimg 80"]),
    (["--device", "tpu"], ["--device tpu", "auto, cuda, mps or cpu"]),
    (["--transformer-in-channels", "48"], ["--transformer-in-channels"]),
    (["--seed", "-1"], ["--seed -1"]),
])
def test_an_invalid_value_is_refused_by_one_line_that_says_what_is_valid(argv, words):
    with pytest.raises(InputError) as error:
        parse_constants(argv)
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in words), line


@pytest.mark.parametrize("cuda, mps, expected", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_selects_cuda_before_mps_before_cpu(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert command_line.choose_device("auto").type == expected
    if not cuda:
        with pytest.raises(InputError, match=r"--device cuda.*cpu"):
            command_line.choose_device("cuda")


@pytest.mark.parametrize("error, status, words", [
    (InputError("bad flag"), 2, "bad flag"), (RunError("gave up"), 1, "gave up"),
    (FileNotFoundError(2, "No such file or directory", "a/b"), 2, "a/b cannot be used: No such file or directory"),
    (OSError(28, "No space left on device", "a/b"), 1, "a/b cannot be used: No space left on device"),
    (KeyboardInterrupt(), 130, "stopped")])
def test_every_error_of_a_script_is_one_line_with_its_exit_status(capsys, error, status, words):
    def fail(argv):
        raise error
    assert command_line.run_script("name.py", fail, []) == status
    assert capsys.readouterr().err == f"name.py: {words}\n"


def test_a_script_without_an_error_returns_its_own_status():
    assert command_line.run_script("name.py", lambda argv: None, []) == 0
    assert command_line.run_script("name.py", len, ["a", "b", "c"]) == 3


@pytest.mark.parametrize("script", ["training", "generate", "evaluate", "export", "report", "demo_images"])
def test_ctrl_c_during_the_imports_is_one_line_and_status_130(tmp_path, script):
    (tmp_path / "numpy.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    file = Path(command_line.__file__).with_name(f"{script}.py")
    done = subprocess.run([sys.executable, file], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (130, f"{script}.py: stopped\n")
