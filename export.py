"""Exports a trained generator: as ONNX, as a small weights file for sharing, or as a web page.

    python export.py runs/NAME --out NAME.onnx      # ONNX: z, offset -> image; of clips, a step of a video
    python export.py runs/NAME --out NAME.pt        # weights only, half precision; generate.py reads it like a run
    python export.py runs/NAME --out NAME.safetensors    # the same in the format of other tools
    python export.py runs/NAME --web DIR            # a page that runs in the browser: python -m http.server -d DIR

ONNX, safetensors and the page need requirements-extras.txt. The page also needs the npm package onnxruntime-web: `npm`
downloads it, or --ort names a folder with it. All exports use the averaged (EMA) generator. An ONNX model is written
only if onnxruntime's images are within one level of 255 of torch's; otherwise the exit status is 1.

offset is added to the code of z, such as a multiple of a principal axis; zeros for none. Any batch size works. A model
with classes has a third input, label: 1 at a class and 0 elsewhere, in the order of the folders' names; zeros for any.

Of a run on clips, from stage 2 on, NAME.onnx makes the next frame of a video: codes, v, anchor, earlier -> image,
next_codes, next_earlier, which are the codes and earlier of the step after it. NAME_start.onnx makes the first ones:
z -> image, codes, earlier; anchor is the first of these codes. z and v are drawn from N(0, I). The page plays a video.
"""

import errors  # noqa: F401  first: Ctrl-C during the other imports ends with one line

# isort: split

import functools
import importlib.util
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import timeit
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import checkpoints
import command_line
import config
import latent_space
import model_definitions
from command_line import InputError, RunError
from model_definitions import Generator, Window, learned_motion

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_DIFFERENCE = 1.0            # levels of 255 between onnxruntime's images and torch's
NO_LIMIT = 2 ** 40                  # bytes
TIMED_RUNS = 11                     # their median is printed
CHECKED_FRAMES = 32                 # of a video
SLIDERS = 8                         # principal axes on the page
WEIGHTS = (".pt", checkpoints.SAFETENSORS)                                # files of weights for sharing
PAGE = Path(__file__).with_name("web_page.html")
ORT_PACKAGE = "onnxruntime-web@1.30.0"
ORT_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")      # what a browser needs to run on the CPU


@torch.inference_mode()
def torch_images(module: nn.Module, *inputs: Tensor) -> Tensor:
    """Returns the images (B, C, H, W) in [-1, 1] of a Generator or StillImage."""
    return module(*inputs)


def levels_apart(image: Tensor, other: Tensor) -> float:
    """Returns the largest difference of two batches of images in [-1, 1], in levels of 255."""
    return 127.5 * (image - other).abs().max().item()


def times_of(onnxruntime: Callable, torch: Callable) -> str:
    """Returns the times of two functions that make one image each, in words; their first calls are not counted."""
    found = (timeit.repeat(function, number=1, repeat=TIMED_RUNS + 1)[1:] for function in (onnxruntime, torch))
    return ", ".join(f"{name} {1000 * statistics.median(seconds):.1f} ms per image"
                     for name, seconds in zip(("onnxruntime", "torch"), found))


def megabytes(*files: Path) -> str:
    return f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB"


# ------------------------------------------------------------------------------------- weights for sharing

def weights_only(saved: dict, about: str = "") -> dict:
    """Returns what a shared file holds of a checkpoint: averaged weights in half precision, and no private paths."""
    constants = {**saved["constants"], "RUNS_DIR": config.RUNS_DIR,
                 "DATA": PureWindowsPath(saved["constants"]["DATA"]).name}      # splits at / and at \
    return {"constants": constants,
            "ema": {name: tensor.half() if tensor.is_floating_point() else tensor
                    for name, tensor in saved["ema"].items()},
            "counters": {name: saved["counters"][name] for name in ("step", "images_seen")},
            "about": {"text": about} if about else saved.get("about", {}),
            **({"axes": saved["axes"]} if saved.get("axes") else {})}


def write_weights(file: Path, saved: dict, generator: Generator, about: str) -> None:
    """Writes the weights file and prints a line about it."""
    weights = weights_only(saved, about)
    shared, c = model_definitions.from_checkpoint(weights)
    z = latent_space.draw_z(0, 0, 16, c.LATENT_DIM)
    difference = levels_apart(torch_images(generator, z), torch_images(shared, z))
    (checkpoints.save_as if file.suffix == ".pt" else checkpoints.save_safetensors)(file, weights)
    print(f"{file}: {megabytes(file)}; half precision changed 16 images by at most {difference:.2f} levels of 255")


# ------------------------------------------------------------------------------------- ONNX

class StillImage(nn.Module):
    """z (B, LATENT_DIM) from N(0, I), an offset (B, LATENT_DIM) that is added to its code, such as a multiple of a
    principal axis, and, of a model with classes, a label (B, K) -> image (B, C, H, W)."""

    def __init__(self, generator: Generator):
        super().__init__()
        self.generator = generator

    def forward(self, z, offset, label=None):
        return self.generator.render(self.generator.start(z, label) + offset)


class VideoStart(nn.Module):
    """z (B, LATENT_DIM) from N(0, I) -> image (B, C, H, W), and the window of a video that starts there: codes
    (B, P, LATENT_DIM) and earlier images (B, P*C, H, W) in [0, 1]. The first of the codes is also the anchor."""

    def __init__(self, generator: Generator):
        super().__init__()
        self.generator, self.past = generator, generator.layer.video.num_frames - 1

    def forward(self, z):
        code = self.generator.start(z)
        image = self.generator.render(code)
        return image, code[:, None].repeat(1, self.past, 1), ((1 + image) / 2).repeat(1, self.past, 1, 1)


class VideoStep(nn.Module):
    """The window's codes (B, P, LATENT_DIM), v (B, MOTION_DIM), anchor (B, LATENT_DIM) and earlier images
    (B, P*C, H, W) -> the next image, and the codes and earlier images of the step after it."""

    def __init__(self, generator: Generator):
        super().__init__()
        self.generator = generator

    def forward(self, codes, v, anchor, earlier):
        image, window, earlier = self.generator.next_frame(Window(codes, v, anchor), earlier)
        return image, window.codes, earlier


def to_onnx(module: nn.Module, inputs: dict[str, Tensor], outputs: Sequence[str]) -> bytes:
    """Returns a module as an ONNX model with inputs and outputs of these names, float32, of any batch size.

    The fixed schedule of the synthetic video is constant. The optimizer computes what depends on constants only, so
    that the kernels of all frames become one kernel.
    """
    import onnxscript
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name")        # the inputs share one batch size, as intended
        program = torch.onnx.export(module.eval(), tuple(inputs.values()), dynamo=True, optimize=False, verbose=False,
                                    dynamic_shapes=({0: batch},) * len(inputs), input_names=list(inputs),
                                    output_names=list(outputs))
    onnxscript.optimizer.optimize(program.model, input_size_limit=NO_LIMIT, output_size_limit=NO_LIMIT)
    model = program.model_proto
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")       # contains source lines with paths of this machine
    return model.SerializeToString()


def session_of(model: bytes) -> Callable[..., list[Tensor]]:
    """Returns a function that runs the model in onnxruntime: named inputs -> outputs in their order."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()          # as many as torch uses, so that times compare
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda **inputs: [torch.from_numpy(found) for found in
                             session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})]


def check_difference(difference: float) -> None:
    if not difference <= LARGEST_DIFFERENCE:                        # also true for NaN
        raise RunError(f"onnxruntime's images differ from torch's by up to {difference:.3g} levels of 255, more than "
                       f"{LARGEST_DIFFERENCE:g}: no ONNX model was written")


@functools.lru_cache(maxsize=1)                 # --out and --web in one call share the models
def checked_onnx(generator: Generator, rolls: bool) -> tuple[dict[str, bytes], str]:
    """Returns {"": the ONNX model} and words on its speed and exactness; with `rolls` that of a video's step, and
    {"_start": that of its start}. Raises RunError if their images differ from torch's at a batch size of 1 or 3."""
    print("tracing the network for ONNX, which takes up to a minute", flush=True)
    latent_dim = generator.vae.latent_dim
    z = latent_space.draw_z(0, 0, 4, latent_dim)
    if rolls:
        return checked_video_models(generator, z)
    still = StillImage(generator)
    inputs = {"z": z, "offset": latent_space.draw_z(1, 0, 4, latent_dim) / 4}
    if generator.classes:
        inputs["label"] = torch.eye(generator.classes)[torch.arange(4) % generator.classes]
    model = to_onnx(still, {name: torch.zeros_like(tensor[:2]) for name, tensor in inputs.items()}, ["image"])
    run, one = session_of(model), {name: tensor[:1] for name, tensor in inputs.items()}
    made = torch.cat([run(**{name: tensor[part] for name, tensor in inputs.items()})[0]
                      for part in (slice(1), slice(1, 4))])
    difference = levels_apart(torch_images(still, *inputs.values()), made)
    check_difference(difference)
    times = times_of(lambda: run(**one), lambda: torch_images(still, *one.values()))
    return {"": model}, f"{times}; at batch sizes 1 and 3 at most {difference:.2g} levels of 255 from torch"


@torch.inference_mode()
def checked_video_models(generator: Generator, z: Tensor) -> tuple[dict[str, bytes], str]:
    """As checked_onnx; compares CHECKED_FRAMES frames, each from onnxruntime's own frames before."""
    first, step = VideoStart(generator), VideoStep(generator)
    v = latent_space.draw_z(1, 0, 4, generator.layer.dynamics.of_v.in_features)
    with torch.inference_mode(False), torch.no_grad():
        _, codes, earlier = first(torch.zeros(2, z.shape[1]))
        inputs = {"codes": codes, "v": torch.zeros(2, v.shape[1]), "anchor": codes[:, 0].clone(), "earlier": earlier}
        models = {"": to_onnx(step, inputs, ["image", "next_codes", "next_earlier"]),
                  "_start": to_onnx(first, {"z": torch.zeros(2, z.shape[1])}, ["image", "codes", "earlier"])}
    run, run_start = session_of(models[""]), session_of(models["_start"])
    differences = []
    for part in (slice(1), slice(1, 4)):
        expected = generator.roll(Window.still(generator.start(z[part]), v[part], first.past))
        image, codes, earlier = run_start(z=z[part])
        differences.append(levels_apart(image, generator(z[part])))
        anchor = codes[:, 0].contiguous()
        for other, _ in itertools.islice(expected, CHECKED_FRAMES):
            image, codes, earlier = run(codes=codes, v=v[part], anchor=anchor, earlier=earlier)
            differences.append(levels_apart(image, other))
    difference = torch.tensor(differences).max().item()             # unlike max() of Python, NaN if there is one
    check_difference(difference)
    one = {"codes": codes[:1], "v": v[:1], "anchor": anchor[:1], "earlier": earlier[:1]}
    return models, (f"{times_of(lambda: run(**one), lambda: step(**one))}; in {CHECKED_FRAMES} frames, at batch sizes "
                    f"1 and 3, at most {difference:.2g} levels of 255 from torch")


# ------------------------------------------------------------------------------------- web page

def copy_onnxruntime(ort: str | None, folder: Path) -> None:
    """Copies onnxruntime-web's files into `folder`, from the folder `ort` or, for None, from npm. Raises InputError."""
    if ort is not None:
        for name in ORT_FILES:
            if not (Path(ort) / name).is_file():
                raise InputError(f"--ort {ort}: contains no {name}; the folder dist of the npm package {ORT_PACKAGE} "
                                 "contains it")
            shutil.copyfile(Path(ort) / name, folder / name)
        return
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(f"npm, which downloads onnxruntime-web, is not installed: install it, or unpack the package "
                         f"{ORT_PACKAGE} and give its folder package/dist with --ort")
    done = subprocess.run([npm, "pack", "--silent", "--fetch-retries=1", ORT_PACKAGE], cwd=folder, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    packed = next(folder.glob("*.tgz"), None)
    if done.returncode or packed is None:
        reason, *_ = done.stderr.strip().splitlines() or ["no reason given"]
        raise InputError(f"npm pack {ORT_PACKAGE} failed ({reason}): try again, or give the package's folder dist with "
                         "--ort")
    with tarfile.open(packed) as package:
        for name in ORT_FILES:
            (folder / name).write_bytes(package.extractfile(f"package/dist/{name}").read())
    packed.unlink()


def page_facts(saved: dict, c: SimpleNamespace, about: str) -> dict:
    """Returns the content of model.json: what the page shows and needs besides the model."""
    axes = saved.get("axes") or {"axes": torch.zeros(0, c.LATENT_DIM), "deviations": torch.zeros(0)}
    return {"name": c.RUN, "about": about or saved.get("about", {}).get("text", ""), "latent_dim": c.LATENT_DIM,
            "image_size": c.IMAGE_SIZE, "channels": c.CHANNELS,
            **{name: saved["counters"][name] for name in ("step", "images_seen")},
            **{name: axes[name][:SLIDERS].tolist() for name in ("axes", "deviations")},
            "motion_dim": c.MOTION_DIM if learned_motion(saved) else 0, "classes": c.CLASSES}


def write_page(folder: Path, saved: dict, generator: Generator, c: SimpleNamespace, ort: str | None,
               about: str) -> None:
    """Writes index.html, model.onnx, of a video also model_start.onnx, model.json and onnxruntime-web into `folder`,
    when all of them are complete.

    Raises InputError for a folder with other files, and what copy_onnxruntime and checked_onnx raise.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "model.onnx").exists():
        raise InputError(f"--web {folder}: contains other files; give a new folder, or that of an earlier page")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        temporary = Path(temporary)
        copy_onnxruntime(ort, temporary)
        models, words = checked_onnx(generator, learned_motion(saved))
        for name, model in models.items():
            (temporary / f"model{name}.onnx").write_bytes(model)
        (temporary / "model.json").write_text(json.dumps(page_facts(saved, c, about)), encoding="utf-8")
        shutil.copyfile(PAGE, temporary / "index.html")
        folder.mkdir(exist_ok=True)
        for file in list(temporary.iterdir()):
            os.replace(file, folder / file.name)
    print(f"{folder}: {megabytes(*folder.iterdir())}, of which the model {megabytes(*folder.glob('model*.onnx'))}, "
          f"{words}")
    if not (saved.get("axes") or learned_motion(saved)):
        print("no sliders: the checkpoint holds no principal axes, which training stores when a run is complete")
    print(f"to view it: python -m http.server -d {folder}, then open http://localhost:8000")


# ------------------------------------------------------------------------------------- command line

def start(argv: Sequence[str] | None) -> None:
    parser = command_line.Parser("export.py", __doc__)
    parser.add_argument("run", help="a run's folder, or a single checkpoint or weights file")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="FILE.onnx, or for the weights only FILE.pt or FILE.safetensors")
    parser.add_argument("--web", type=Path, metavar="DIR", help="folder for a web page that runs in the browser")
    parser.add_argument("--ort", metavar="DIR",
                        help="folder with onnxruntime-web's files, such as an earlier page [npm downloads them]")
    parser.add_argument("--about", default="", metavar="TEXT",
                        help="text for the weights file or the page, such as the data and its licence")
    arguments = parser.parse_args(argv)
    out, web = arguments.out, arguments.web
    if not out and not web:
        raise InputError("nothing to do: give --out FILE, --web DIR, or both")
    if out and out.suffix not in (".onnx", *WEIGHTS):
        raise InputError(f"--out {out} is invalid: must end with .onnx, .pt or .safetensors")
    if arguments.ort and not web:
        raise InputError(f"--ort {arguments.ort} is for a page: give --web DIR too")
    for name in ONNX_PACKAGES if web or out.suffix == ".onnx" else ():
        if importlib.util.find_spec(name) is None:
            raise InputError(f"ONNX needs the package {name}, which is not installed: pip install -r "
                             "requirements-extras.txt")
    source, saved = checkpoints.find(arguments.run, warn=lambda line: print(line, file=sys.stderr))
    generator, c = model_definitions.from_checkpoint(saved)
    if out and out.suffix in WEIGHTS:
        if out.exists() and out.resolve().parent == source.resolve().parent:
            raise InputError(f"--out {out} exists beside the weights that are read: give another name")
        write_weights(out, saved, generator, arguments.about)
    elif out:
        models, words = checked_onnx(generator, learned_motion(saved))
        files = [out.with_stem(out.stem + name) for name in models]
        for file, model in zip(files, models.values()):
            with checkpoints.atomic_write(file) as handle:
                handle.write(model)
        print(f"{' and '.join(map(str, files))}: {megabytes(*files)}, {words}")
    if web:
        write_page(web, saved, generator, c, arguments.ort, arguments.about)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 the exported model makes other images, 2 invalid input."""
    return command_line.run_script("export.py", start, argv)


if __name__ == "__main__":
    sys.exit(main())
