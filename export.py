"""A trained generator for use elsewhere: as ONNX, as a small file for sharing, as a web page.

    python export.py runs/NAME --out NAME.onnx      # ONNX: z in, image out, any batch size
    python export.py runs/NAME --out NAME.pt        # weights only, half precision; generate.py takes it like a run
    python export.py runs/NAME --web DIR            # a page that draws in the browser: python -m http.server -d DIR

ONNX and the page need requirements-extras.txt; the page also the npm package onnxruntime-web, which `npm` fetches or
--ort brings. All of them take the averaged (EMA) generator, and the ONNX file is only written when onnxruntime draws
with it what torch draws: status 1 where it does not, 2 for bad input.
"""

import functools
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path, PureWindowsPath

import torch

import checkpoints
import command_line
import config
import latent_space
import model_definitions
from errors import InputError

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_DIFFERENCE = 1.0            # levels of 255 between onnxruntime's picture and torch's
NO_LIMIT = 2 ** 40                  # bytes
TIMED_RUNS = 11                     # of which the median is given
SLIDERS = 8                         # principal axes on the page
PAGE = Path(__file__).with_name("web_page.html")
ORT_PACKAGE = "onnxruntime-web@1.30.0"
ORT_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")      # all that the CPU needs in a browser


class DifferenceError(Exception):
    """An exported model does not draw what the run's generator draws."""


# ------------------------------------------------------------------------------------- weights for sharing

def weights_only(saved, about=""):
    """What a shared file holds of a loaded checkpoint: the averaged weights in half precision, and no private path."""
    constants = {**saved["constants"], "DATA": PureWindowsPath(saved["constants"]["DATA"]).name,    # takes / and \
                 "RUNS_DIR": config.RUNS_DIR}
    weights = {"constants": constants,
               "ema": {name: tensor.half() if tensor.is_floating_point() else tensor
                       for name, tensor in saved["ema"].items()},
               "counters": {name: saved["counters"][name] for name in ("step", "images_seen")},
               "about": {"text": about} if about else saved.get("about", {})}
    if saved.get("axes"):
        weights["axes"] = saved["axes"]
    return weights


def write_weights(file, saved, generator, c, about):
    """The file, and a line about it. Raises OSError."""
    weights = weights_only(saved, about)
    shared, _ = model_definitions.from_checkpoint(weights, "cpu")
    z = latent_space.draw_z(0, 0, 16, c.LATENT_DIM)
    difference = 127.5 * (draw(generator, z) - draw(shared, z)).abs().max().item()
    checkpoints.save_as(file, weights)
    print(f"{file}: {megabytes(file)}, {time_line('torch', lambda: draw(shared, z[:1]))}; half precision changed 16 "
          f"pictures by at most {difference:.2f} levels of 255")


@torch.inference_mode()
def draw(generator, z):
    return generator(z)


# ------------------------------------------------------------------------------------- ONNX

def check_packages():
    """Raises InputError where a package that ONNX needs is not installed."""
    for name in ONNX_PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError:
            raise InputError(f"ONNX needs the package {name}, which is not installed: "
                             "pip install -r requirements-extras.txt") from None


def to_onnx(generator, latent_dim):
    """The generator as an ONNX file's bytes: z (batch, LATENT_DIM) -> image (batch, C, H, W) in [-1, 1], float32.

    The synthetic video's schedule is a constant of the graph, and what follows from constants alone is computed
    here, once: by that the kernels of all the video's frames become a single one.
    """
    import onnxscript
    program = torch.onnx.export(generator, (torch.zeros(2, latent_dim),), dynamo=True, optimize=False, verbose=False,
                                dynamic_shapes=({0: torch.export.Dim("batch")},), input_names=["z"],
                                output_names=["image"])
    onnxscript.optimizer.optimize(program.model, input_size_limit=NO_LIMIT, output_size_limit=NO_LIMIT)
    model = program.model_proto
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")       # the source lines behind each node, with this machine's paths
    return model.SerializeToString()


@functools.lru_cache(maxsize=1)          # a file and a page in one call take the same model
def checked_onnx(generator, latent_dim):
    """(bytes, words): the ONNX file, and what onnxruntime did with it at two batch sizes. Raises DifferenceError."""
    import onnxruntime
    print("tracing the network for ONNX, which takes up to a minute", flush=True)
    model = to_onnx(generator, latent_dim)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()          # as many as torch has, to compare their times
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    z = latent_space.draw_z(0, 0, 4, latent_dim)
    pairs = [(draw(generator, part), torch.from_numpy(session.run(None, {"z": part.numpy()})[0]))
             for part in (z[:1], z[1:])]
    difference = max(127.5 * (one - other).abs().max().item() if one.shape == other.shape else float("inf")
                     for one, other in pairs)
    if not difference <= LARGEST_DIFFERENCE:                        # nan is no match either
        raise DifferenceError(f"onnxruntime's pictures differ from torch's by up to {difference:.3g} levels of 255, "
                              f"more than {LARGEST_DIFFERENCE:g}: no ONNX file was written")
    times = ", ".join([time_line("onnxruntime", lambda: session.run(None, {"z": z[:1].numpy()})),
                       time_line("torch", lambda: draw(generator, z[:1]))])
    return model, f"{times}; at batches of 1 and 3 at most {difference:.2g} levels of 255 from torch"


def time_line(name, function):
    """'name 12.3 ms an image' of a function that makes one image: the median of TIMED_RUNS, after one to warm up."""
    seconds = []
    for _ in range(TIMED_RUNS + 1):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return f"{name} {1000 * statistics.median(seconds[1:]):.1f} ms an image"


def write_onnx(file, generator, c):
    """The file, and a line about it. Raises DifferenceError, OSError; then there is no file."""
    model, words = checked_onnx(generator, c.LATENT_DIM)
    with checkpoints.atomic_write(file) as handle:
        handle.write(model)
    print(f"{file}: {megabytes(file)}, {words}")


def megabytes(*files):
    return f"{sum(Path(file).stat().st_size for file in files) / 1e6:.1f} MB"


# ------------------------------------------------------------------------------------- web page

def copy_onnxruntime(ort, folder):
    """onnxruntime-web's files into `folder`: from the folder `ort`, or out of the npm package where that is None.

    Raises InputError where they can't be had.
    """
    if ort is not None:
        for name in ORT_FILES:
            if not (Path(ort) / name).is_file():
                raise InputError(f"--ort {ort}: no {name} there; it is in the folder dist of the npm package "
                                 f"{ORT_PACKAGE}")
            shutil.copyfile(Path(ort) / name, folder / name)
        return
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(f"npm, which fetches onnxruntime-web, is not installed: where it is, `npm pack {ORT_PACKAGE}` "
                         "gives a .tgz; unpack it and give its folder package/dist with --ort")
    done = subprocess.run([npm, "pack", "--silent", "--fetch-retries=1", ORT_PACKAGE], cwd=folder, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    packed = list(folder.glob("*.tgz"))
    if done.returncode or not packed:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise InputError(f"npm pack {ORT_PACKAGE} failed ({reason}); with the package's folder dist at hand, give it "
                         "with --ort")
    with tarfile.open(packed[0]) as package:
        for name in ORT_FILES:
            (folder / name).write_bytes(package.extractfile(f"package/dist/{name}").read())
    packed[0].unlink()


def page_facts(saved, c, about):
    """What the page needs to know beside the model, for model.json."""
    facts = {"name": c.RUN, "about": about or saved.get("about", {}).get("text", ""), "latent_dim": c.LATENT_DIM,
             "image_size": c.IMAGE_SIZE, "channels": c.CHANNELS, "axes": [], "deviations": [],
             **{name: saved["counters"][name] for name in ("step", "images_seen")}}
    if saved.get("axes"):
        facts |= {name: saved["axes"][name][:SLIDERS].tolist() for name in ("axes", "deviations")}
    return facts


def write_page(folder, saved, generator, c, ort, about):
    """index.html, model.onnx, model.json and onnxruntime-web in `folder`, which appear there when all are complete.

    Raises InputError, DifferenceError, OSError.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "model.onnx").exists():
        raise InputError(f"--web {folder}: there are other files in it; give a new folder, or that of an earlier page")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        temporary = Path(temporary)
        copy_onnxruntime(ort, temporary)
        model, words = checked_onnx(generator, c.LATENT_DIM)
        (temporary / "model.onnx").write_bytes(model)
        (temporary / "model.json").write_text(json.dumps(page_facts(saved, c, about)), encoding="utf-8")
        shutil.copyfile(PAGE, temporary / "index.html")
        folder.mkdir(exist_ok=True)
        for file in list(temporary.iterdir()):
            os.replace(file, folder / file.name)
    print(f"{folder}: {megabytes(*folder.iterdir())}, of which the model {megabytes(folder / 'model.onnx')}, {words}")
    if not saved.get("axes"):
        print("the checkpoint holds no principal axes (training stores them when a run is done): no sliders")
    print(f"to see it: python -m http.server -d {folder}, then open http://localhost:8000")


# ------------------------------------------------------------------------------------- command line

def parse(argv):
    parser = command_line.Parser("export.py", __doc__)
    parser.add_argument("run", help="a run's folder, or a single checkpoint or weights file")
    parser.add_argument("--out", metavar="FILE", help="FILE.onnx, or FILE.pt for the weights only")
    parser.add_argument("--web", metavar="DIR", help="folder for a web page that draws in the browser")
    parser.add_argument("--ort", metavar="DIR", help="folder that holds onnxruntime-web's files, such as an earlier "
                                                     "page's [npm fetches them]")
    parser.add_argument("--about", default="", metavar="TEXT", help="a few words that go with the .pt file, or onto "
                                                                    "the page: what it was trained on, its licence")
    arguments = parser.parse_args(argv)
    if not arguments.out and not arguments.web:
        raise InputError("nothing to do: give --out FILE, --web DIR, or both")
    if arguments.out and Path(arguments.out).suffix not in (".onnx", ".pt"):
        raise InputError(f"--out {arguments.out} can't be: give a name that ends with .onnx or .pt")
    if arguments.out and arguments.web and Path(arguments.out).resolve() == Path(arguments.web).resolve():
        raise InputError(f"--out and --web are both {arguments.out}: give two names")
    if arguments.ort and not arguments.web:
        raise InputError(f"--ort {arguments.ort} is for the page: give --web DIR with it")
    return arguments


def start(argv):
    arguments = parse(argv)
    if arguments.web or arguments.out.endswith(".onnx"):
        check_packages()
    source, saved = checkpoints.find(arguments.run, "cpu", warn=lambda line: print(line, file=sys.stderr))
    generator, c = model_definitions.from_checkpoint(saved, "cpu")
    if arguments.out:
        out = Path(arguments.out)
        if out.suffix == ".pt" and out.exists() and out.resolve().parent == source.resolve().parent:
            raise InputError(f"--out {out} is there already, beside the weights that are read: give another name")
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".onnx":
            write_onnx(out, generator, c)
        else:
            write_weights(out, saved, generator, c, arguments.about)
    if arguments.web:
        write_page(arguments.web, saved, generator, c, arguments.ort, arguments.about)
    return 0


def main(argv=None):
    """Exit status: 0 done, 1 the exported model draws other pictures, 2 bad input (one line says what)."""
    try:
        return start(argv)
    except InputError as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    except DifferenceError as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("export.py: stopped", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"export.py: {error.filename or 'the output'}: can't be written ({error.strerror})", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
