"""camera_clips.py: paths stay on the photo and are smooth, frames are the squares of the path; the script's errors."""

import numpy as np
import pytest
from PIL import Image

import camera_clips
import data


@pytest.mark.parametrize("key", ["a.png", "b.png", "c/d.jpg"])
def test_paths_stay_on_the_photo_move_smoothly_and_depend_on_their_key(key):
    path = camera_clips.camera_path(key, 200)
    low, high = camera_clips.SIDE
    assert path["side"].min() >= low and path["side"].max() <= high
    for name in ("left", "top"):
        assert path[name].min() >= 0 and (path[name] + path["side"]).max() <= 1 and np.ptp(path[name]) > 0.02
    assert abs(path["light"] - 1).max() <= camera_clips.LIGHT
    for values in path.values():
        assert abs(np.diff(values)).max() < 0.04
    assert np.array_equal(camera_clips.camera_path(key, 50)["left"], path["left"][:50])
    assert not np.array_equal(camera_clips.camera_path(key, 200, 1)["left"], path["left"])
    assert not np.array_equal(camera_clips.camera_path(key + "x", 200)["left"], path["left"])


def test_frames_are_the_squares_of_the_path():
    """On a photo that grows brighter to the right and down, a frame's mean and range say which square it shows."""
    ramp = np.arange(128) + 0.5
    photo = np.stack(np.broadcast_arrays(ramp, ramp[:, None], 100), axis=2)
    path = camera_clips.camera_path("a", 20)
    for frame, left, top, side, light in zip(camera_clips.film(photo.astype(np.uint8), path, 64),
                                             *(path[name] for name in ("left", "top", "side", "light"))):
        assert frame.shape == (64, 64, 3)
        for channel, start in enumerate((left, top)):
            assert frame[..., channel].mean() == pytest.approx(light * 128 * (start + side / 2), abs=1)
            assert np.ptp(frame[..., channel].astype(int)) == pytest.approx(light * 128 * side * 63 / 64, abs=3)
        assert abs(frame[..., 2] - 100 * light).max() <= 0.51
    grey = camera_clips.film(np.full((40, 40, 1), 9, np.uint8), path, 32)
    assert next(grey).shape == (32, 32)


def photos(folder, count):
    (folder / "in").mkdir(parents=True)
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "in" / f"{i}.png")
    return folder


def test_the_script_makes_clips_that_training_reads_and_continues(tmp_path, capsys):
    source, out = photos(tmp_path / "photos", 3), tmp_path / "clips"
    (source / "bad.png").write_bytes(b"no image")
    command = [str(source), str(out), "--frames", "5", "--size", "32"]
    assert camera_clips.main(command) == 0
    text = capsys.readouterr().out
    assert "skipped bad.png: " in text and f"3 clips of 5 frames of 32 x 32 pixels in {out}" in text
    clips = data.load_images(out, 32, 3, tmp_path / "cache", workers=0, folders="clips")
    assert clips.clip_names == ["in/0.png", "in/1.png", "in/2.png"] and clips.clip_offsets.tolist() == [0, 5, 10, 15]
    written = (out / "in" / "1.png" / "003.jpg").stat().st_mtime_ns
    (out / "in" / "2.png" / "004.jpg").unlink()
    (out / "in" / "2.png").rename(out / "in" / ".2.png.part")                           # an interrupted clip
    assert camera_clips.main(command) == 0
    assert len(list((out / "in" / "2.png").iterdir())) == 5 and not (out / "in" / ".2.png.part").exists()
    assert (out / "in" / "1.png" / "003.jpg").stat().st_mtime_ns == written


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no image")
    for name, words in (("none", "none"), ("empty", "no images in it"), ("bad", "none of its images can be used")):
        assert camera_clips.main([str(tmp_path / name), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error and error.startswith("camera_clips.py: ")


def test_other_settings_own_output_and_short_clips_are_refused(tmp_path, capsys):
    source, out = photos(tmp_path / "photos", 1), tmp_path / "clips"
    assert camera_clips.main([str(source), str(out), "--frames", "5", "--size", "32"]) == 0
    (tmp_path / "file").write_text("")
    for argv, words in (([source, out, "--size", "32"], "was filmed with --frames 5 --size 32 --seed 0"),
                        ([source, source], "contains the photos"), ([source / "in", source], "contains the photos"),
                        ([source, tmp_path / "new", "--frames", "2"], "--frames 2 is invalid: must be 3 or more"),
                        ([source, tmp_path / "file"], "is a file")):
        capsys.readouterr()
        assert camera_clips.main([str(word) for word in argv]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error
    assert not (tmp_path / "new").exists()


def test_photos_with_alike_names_are_different_clips(tmp_path, capsys):
    source, out = photos(tmp_path / "photos", 1), tmp_path / "clips"
    Image.new("RGB", (40, 40)).save(source / "in_0.png")
    assert camera_clips.main([str(source), str(out), "--frames", "3", "--size", "32"]) == 0
    clips = data.load_images(out, 32, 3, tmp_path / "cache", workers=0, folders="clips")
    assert clips.clip_names == ["in/0.png", "in_0.png"]
