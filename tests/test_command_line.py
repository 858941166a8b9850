import pytest
import torch

import command_line
import config
from command_line import InputError, parse_constants


def test_every_constant_but_the_derived_is_a_flag_with_its_comment_as_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_constants(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, (_, comment) in command_line.constants_with_comments().items():
        assert comment, f"{name} has no comment"
        if name in command_line.DERIVED:
            assert command_line.flag(name) + " " not in text
        else:
            assert command_line.flag(name) in text
            assert " ".join(comment.split()) in text


def test_all_of_config_is_seen():
    assert set(command_line.constants_with_comments()) == {n for n in vars(config) if n.isupper()}


def test_flags_overrule_config_and_derived_constants_follow():
    c, given = parse_constants(["--batch-size", "32", "--num-frames", "8", "--flip", "--lambda-gp=5"])
    assert (c.BATCH_SIZE, c.NUM_FRAMES, c.FLIP, c.LAMBDA_GP) == (32, 8, True, 5.0)
    assert c.TRANSFORMER_IN_CHANNELS == 8 * c.CHANNELS
    assert given == {"BATCH_SIZE", "NUM_FRAMES", "FLIP", "LAMBDA_GP"}
    assert c.STEPS == config.STEPS


@pytest.mark.parametrize("argv,words", [
    (["--image-size", "100"], ["--image-size 100", "32, 48, 64", "256"]),
    (["--image-size", "big"], ["--image-size", "big"]),
    (["--channels", "2"], ["--channels 2", "1 or 3"]),
    (["--batch-siz", "3"], ["--batch-siz"]),
    (["--batch-size", "0"], ["--batch-size 0", "above 0"]),
    (["--lambda-gp", "nan"], ["--lambda-gp nan"]),
    (["--learning-rate", "inf"], ["--learning-rate inf"]),
    (["--run", "x" * 101], ["100 characters"]),
    (["--learning-rate", "-1"], ["--learning-rate -1", "above 0"]),
    (["--patch", "10"], ["--patch 10", "4, 8, 16"]),
    (["--image-size", "48", "--patch", "32"], ["--patch 32", "--image-size 48", "4, 8, 12, 16"]),
    (["--transformer-dim", "100"], ["--transformer-dim 100", "96 or 108"]),
    (["--run", "../up"], ["--run ../up"]),
    (["--batch-size", "12", "--micro-batch", "5"], ["--micro-batch 5", "--batch-size 12", "1, 2, 3, 4, 6, 12"]),
    (["--micro-batch", "-1"], ["--micro-batch -1", "0 or more"]),
    (["--device", "tpu"], ["--device tpu", "auto, cuda, mps or cpu"]),
    (["--transformer-in-channels", "48"], ["--transformer-in-channels"]),
    (["--seed", "-1"], ["--seed -1"]),
])
def test_what_can_not_be_is_refused_in_one_line_that_says_what_can(argv, words):
    with pytest.raises(InputError) as error:
        parse_constants(argv)
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in words), line


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"--device cuda.*cpu"):
        command_line.choose_device("cuda")


@pytest.mark.parametrize("cuda,mps,expected", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_takes_cuda_before_mps_before_cpu(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert command_line.choose_device("auto").type == expected
