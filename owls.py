"""Draws owls on a branch under a wide sky: image `index` of a seed, a function of both.

Forms are signed distance functions (negative inside, 0 on the edge), so edges are smooth at any size. An image spans
-1..1 in both directions, x to the right and y down.
"""

import copy
import math

import numpy as np

Point = tuple[float, float]
Planes = tuple[np.ndarray, np.ndarray]    # two arrays (size, size): coordinates, or light

# OKLCH (lightness, chroma, hue in turns): the sky from the zenith to the horizon, then light and shadow.
SKIES = {
    "dawn": [(.66, .09, .78), (.80, .10, .97), (.92, .09, .20), (.98, .05, .22), (.66, .07, .85)],
    "day": [(.62, .13, .69), (.78, .09, .65), (.94, .05, .50), (1.0, .02, .28), (.62, .06, .72)],
    "dusk": [(.33, .12, .80), (.55, .17, .97), (.82, .15, .17), (.93, .11, .16), (.48, .12, .85)],
    "night": [(.20, .08, .76), (.33, .10, .73), (.52, .09, .62), (.90, .05, .65), (.40, .10, .76)],
}
STARS = {"dawn": 0, "day": 0, "dusk": 0.35, "night": 1}  # brightness
GROUND = {"dawn": 0.52, "day": 0.58, "dusk": 0.32, "night": 0.22}  # lightness of the nearest land
LANDS = ["hills", "mountains", "pines", "sea"]
EARS = {"none": 0, "short": 0.10, "long": 0.24}  # length of the tufts
FACES = ["goggles", "heart", "round"]
PATTERNS = ["plain", "dots", "stripes", "chevrons", "scales", "diamonds"]
SCHEMES = {"analogous": 0.10, "triadic": 0.33, "split": 0.42, "complementary": 0.5}  # hue step to the accent
OWL_WINDOW = 1.15               # no part of an owl, wings included, is farther from (0, 0) in the still set


def factors(index: int, seed: int = 0) -> dict:
    """Returns what image `index` shows, {name: value}: independent draws, a function of (seed, index)."""
    rng = np.random.default_rng([seed, index])

    def one_of(options):
        return list(options)[rng.integers(len(options))]

    background = {"sky": one_of(SKIES), "sky_hue": rng.uniform(-0.03, 0.03), "land": one_of(LANDS),
                  "land_hue": rng.uniform(0.30, 0.85), "horizon": rng.uniform(0.10, 0.45)}
    shape = {"ears": one_of(EARS), "face": one_of(FACES), "width": rng.uniform(0.88, 1.12),
             "head": rng.uniform(0.92, 1.10), "eyes": rng.uniform(0.88, 1.12)}
    pose = {"x": rng.uniform(-0.07, 0.07), "lean": rng.uniform(-0.10, 0.10), "tilt": rng.uniform(-0.22, 0.22),
            "left_wing": rng.beta(0.5, 1.2), "right_wing": rng.beta(0.5, 1.2), "lids": rng.beta(0.6, 2.2),
            "mood": rng.uniform(-0.3, 0.25), "gaze": rng.uniform(-math.pi, math.pi),
            "gaze_reach": rng.uniform(0, 1), "branch": rng.uniform(-0.10, 0.10)}
    colour = {"hue": rng.uniform(0, 1), "scheme": one_of(SCHEMES), "value": rng.uniform(0, 1),
              "vivid": rng.uniform(0, 1)}
    texture = {"pattern": one_of(PATTERNS), "pattern_size": rng.uniform(0.85, 1.25)}
    light = {"sun": rng.uniform(-1, 1), "sun_height": rng.uniform(0, 1), "contrast": rng.uniform(0, 1)}
    return background | shape | pose | colour | texture | light


# ------------------------------------------------------------------------------------- colours and forms

def oklch(lightness: float, chroma: float, hue: float) -> np.ndarray:
    """Converts OKLCH (Ottosson 2020; hue in turns) to sRGB in [0, 1], (3, 1, 1)."""
    a, b = chroma * math.cos(2 * math.pi * hue), chroma * math.sin(2 * math.pi * hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = [4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
              -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
              -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short]
    linear = [min(max(light, 0), 1) for light in linear]
    rgb = [12.92 * c if c < 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in linear]
    return np.array(rgb, np.float32).reshape(3, 1, 1)


def length(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y)              # several times faster than np.hypot


def mix(first: np.ndarray, second: np.ndarray | float, amount: np.ndarray | float) -> np.ndarray:
    return first + (second - first) * amount


def ellipse(x: np.ndarray, y: np.ndarray, centre: Point, radii: Point) -> np.ndarray:
    """Signed distance to an ellipse, exact to first order at the edge."""
    u, v = (x - centre[0]) / radii[0], (y - centre[1]) / radii[1]
    k = length(u, v) + 1e-6
    return k * (k - 1) / (length(u / radii[0], v / radii[1]) + 1e-6)


def polygon(x: np.ndarray, y: np.ndarray, corners: list[Point]) -> np.ndarray:
    """Signed distance to a convex polygon, corners clockwise."""
    edges = []
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]):
        side = math.hypot(x1 - x0, y1 - y0)
        edges.append((x - x0) * ((y1 - y0) / side) - (y - y0) * ((x1 - x0) / side))
    return np.maximum.reduce(edges)


def join(first: np.ndarray, second: np.ndarray, blend: float) -> np.ndarray:
    """Union of two forms, rounded over a width of `blend`."""
    h = np.maximum(blend - np.abs(first - second), 0) / blend
    return np.minimum(first, second) - h * h * blend / 4


def rotate(x: np.ndarray, y: np.ndarray, angle: float, centre: Point) -> Planes:
    """Coordinates for a form turned clockwise by `angle` (radians) about `centre`."""
    c, s = math.cos(angle), math.sin(angle)
    dx, dy = x - centre[0], y - centre[1]
    return c * dx + s * dy + centre[0], c * dy - s * dx + centre[1]


class Scene:
    """An image while it is drawn: `canvas` (3, size, size) in [0, 1], coordinates, factors `f`, colours, light."""

    def __init__(self, index: int, size: int, seed: int):
        self.f = f = factors(index, seed) | {"turn": 0.0}  # only the owls of clips turn their faces
        self.rng = np.random.default_rng([seed, index, 1])  # for stars, clouds and trees
        axis = ((np.arange(size) + 0.5) * 2 / size - 1).astype(np.float32)
        self.x, self.y = np.broadcast_to(axis, (size, size)), np.broadcast_to(axis[:, None], (size, size))
        self.axis, self.pixel = axis, 2 / size
        colours = [oklch(lightness, chroma, hue + f["sky_hue"]) for lightness, chroma, hue in SKIES[f["sky"]]]
        *self.sky, self.light, shadow = colours
        self.shadow = shadow * (1.0 - 0.4 * f["contrast"])
        away = math.copysign(0.56, f["sun"])  # beside the owl
        self.sun = (away + 0.24 * f["sun"], -0.80 + 0.50 * f["sun_height"])
        reach = math.hypot(self.sun[0], self.sun[1], 0.65)
        self.towards = (self.sun[0] / reach, self.sun[1] / reach, 0.65 / reach)
        self.canvas = np.zeros((3, size, size), np.float32)
        self.colours = palette(f)
        self.branch = np.zeros((size, size), np.float32)  # its coverage, once it is drawn

    def window(self, x: float, y: float, scale: float) -> "Scene":
        """Returns the part of this scene around an owl of `scale` times the usual size whose (0, 0) is at (x, y),
        in the owl's coordinates. Its canvas is a view of this one.
        """
        part = copy.copy(self)
        reach = OWL_WINDOW * scale
        columns, rows = (slice(*np.searchsorted(self.axis, (at - reach, at + reach))) for at in (x, y))
        part.x, part.y = (self.x[rows, columns] - x) / scale, (self.y[rows, columns] - y) / scale
        part.canvas, part.branch = self.canvas[:, rows, columns], self.branch[rows, columns]
        part.pixel = self.pixel / scale
        return part

    def cover(self, distance: np.ndarray, soft: float = 1.0) -> np.ndarray:
        """Returns the coverage of each pixel by a form, in [0, 1]; soft: width of the edge, pixels."""
        return np.clip(0.5 - distance / (self.pixel * soft), 0, 1)

    def paint(self, cover: np.ndarray, colour: np.ndarray, lit: Planes | None = None) -> None:
        """Blends `colour` (3, 1, 1) into the canvas with weight `cover`; lit: (facing, rim) from `volume`."""
        # One channel at a time: the temporary arrays stay in the processor's cache.
        for plane, value, light, shadow in zip(self.canvas, colour, self.light, self.shadow):
            if lit is not None:
                amount, rim = lit
                value = value * (shadow + (1.08 * light - shadow) * amount + 0.35 * light * rim)
            plane += (value - plane) * cover

    def blobs(self, points: np.ndarray, radii: np.ndarray, strength: np.ndarray) -> np.ndarray:
        """Returns a sum of Gaussian spots: points (n, 2), radii (n, 2), strength (n, 1) -> (size, size)."""
        across = np.exp(-((self.axis - points[:, :1]) / radii[:, :1]) ** 2)
        down = np.exp(-((self.axis - points[:, 1:]) / radii[:, 1:]) ** 2)
        # A matrix product would start BLAS threads, which take longer than they save here.
        return np.einsum("nh,nw->hw", (down * strength).astype(np.float32), across.astype(np.float32))

    def volume(self, distance: np.ndarray, depth: float) -> Planes:
        """Returns the light on a form that rises over `depth` from its outline: (facing the sun, rim), each in [0, 1].
        """
        slope_y, slope_x = np.gradient(distance, self.pixel)
        rise = np.clip(1 + distance / depth, 0, 1)
        rise = rise * np.sqrt(rise)
        nx, ny = slope_x * rise, slope_y * rise
        nz = np.sqrt(np.clip(1 - nx * nx - ny * ny, 0.02, 1))
        sideways = nx * self.towards[0] + ny * self.towards[1]
        facing = np.clip(sideways + nz * self.towards[2], -0.2, 1)
        rim = np.clip(sideways, 0, 1)
        return (facing + 0.2) / 1.2, rim * rim * rim


# ------------------------------------------------------------------------------------- background

def draw_sky(s: Scene) -> None:
    top, middle, low = s.sky
    height = np.clip((s.axis + 1) / (1 + s.f["horizon"]), 0, 1)[:, None]  # 0 at the zenith, 1 at the horizon
    upper, lower = mix(top, middle, height / 0.55), mix(middle, low, (height - 0.55) / 0.45)
    s.canvas[:] = np.where(height < 0.55, upper, lower)
    if STARS[s.f["sky"]]:
        radii = s.rng.uniform(0.011, 0.021, (60, 1)).repeat(2, 1)
        stars = s.blobs(s.rng.uniform(-1, [1, 0.4], (60, 2)), radii, s.rng.uniform(0.2, 1, (60, 1)))
        s.paint(np.minimum(stars, 1) * STARS[s.f["sky"]], oklch(0.97, 0.03, 0.25))
    x, y = s.x - s.sun[0], s.y - s.sun[1]
    s.paint(0.55 * np.exp(-length(x, y) / 0.28), s.light)
    s.paint(s.cover(length(x, y) - 0.15, 1.5), mix(s.light, 1, 0.5))
    if s.f["sky"] == "night":
        s.paint(0.25 * s.cover(length(x - 0.05, y - 0.03) - 0.07, 4), middle)  # a dark spot on the moon
    banks = s.rng.uniform([-1, -0.85], [1, s.f["horizon"] - 0.15], (4, 1, 2))  # four banks of seven clouds
    places = (banks + s.rng.normal(0, 1, (4, 7, 2)) * [0.22, 0.025]).reshape(-1, 2)
    clouds = s.blobs(places, s.rng.uniform([0.10, 0.018], [0.24, 0.045], (28, 2)), np.full((28, 1), 0.30))
    s.paint(np.minimum(clouds, 0.75), mix(s.light, low, 0.45))


def ridge(s: Scene, land: str, base: float, roughness: float) -> np.ndarray:
    """Returns the upper edge of one row of land, (size,)."""
    x, a = s.axis, s.rng.uniform(0, 2 * math.pi, 4).astype(np.float32)
    if land == "mountains":
        saw = sum(np.abs((x * k + a[i]) % 2 - 1) / k for i, k in enumerate((1.3, 2.9, 5.3)))
        return base + 0.18 - 0.40 * roughness * saw
    rolling = 0.09 * np.sin(2.1 * x + a[0]) + 0.05 * np.sin(4.3 * x + a[1])
    if land == "pines":
        tree = np.abs((x * 7 + a[2]) % 1 - 0.5) * 2
        return base + rolling - 0.22 * roughness * (1 - tree) * (0.7 + 0.3 * np.sin(9 * x + a[3]))
    return base + rolling * 1.3


def draw_land(s: Scene) -> None:
    low, horizon = s.sky[2], s.f["horizon"]
    ground = oklch(GROUND[s.f["sky"]], 0.10, s.f["land_hue"])
    if s.f["land"] == "sea":
        depth = np.clip((s.axis - horizon) / (1 - horizon), 0, 1)[:, None]
        water = s.cover(horizon - s.y)
        s.paint(water, mix(mix(low, s.sky[1], 0.35), mix(s.sky[0], ground, 0.35), depth ** 0.6))
        waves = np.sin(60 * np.sqrt(np.maximum(s.y - horizon, 0)) + 2 * np.sin(5 * s.x + 3 * s.y))
        glitter = np.exp(-((s.x - s.sun[0]) / (0.10 + 0.3 * depth)) ** 2 - 1.5 * depth)
        s.paint(water * np.maximum(waves, 0) * (0.65 * glitter + 0.06), s.light)
        return
    for row, near in enumerate((0.25, 0.6, 1.0)):
        top = ridge(s, s.f["land"], horizon + 0.20 * row, 1 - 0.25 * row)
        mist = 1 - 0.28 * np.clip((s.y - top) / 0.5, 0, 1)  # in the valleys
        s.paint(s.cover(top - s.y), mix(low, ground, near * mist))


# ------------------------------------------------------------------------------------- owl

def pattern(name: str, x: np.ndarray, y: np.ndarray, size: float) -> np.ndarray:
    """Returns the marks on the breast, in [0, 1]; size: distance between two marks."""
    u, v = x / size, y / size
    row = np.floor(v)
    du, dv = (u + 0.5 * row) % 1 - 0.5, v - row - 0.5  # every second row is shifted by half
    marks = {"dots": lambda: 0.30 - length(du, dv),
             "stripes": lambda: 0.24 - np.abs((v + 0.10 * u * u) % 1 - 0.5),
             "chevrons": lambda: 0.22 - np.abs((v + 0.8 * np.abs(u % 1 - 0.5)) % 1 - 0.5),
             "scales": lambda: 0.16 - np.abs(length(du, dv + 0.5) - 0.55),
             "diamonds": lambda: 0.36 - np.abs(du) - np.abs(dv) * 0.8}
    return np.clip(0.5 + marks[name]() * 9 * size / 0.13, 0, 1) if name in marks else np.zeros_like(u)


def palette(f: dict) -> dict[str, np.ndarray]:
    """Returns the colours of the owl's parts."""
    hue, accent = f["hue"], f["hue"] + SCHEMES[f["scheme"]]
    # Yellow is lighter than blue: at equal lightness it would look brown.
    light = 0.56 + 0.16 * f["value"] + 0.09 * math.cos(2 * math.pi * (hue - 0.27))
    mark_light = 0.58 + 0.10 * math.cos(2 * math.pi * (accent - 0.27))
    chroma = 0.09 + 0.07 * f["vivid"]
    return {"body": oklch(light, chroma, hue), "wing": oklch(light - 0.10, chroma, hue + 0.04),
            "breast": oklch(0.90, 0.05, hue + 0.06), "mark": oklch(mark_light, chroma + 0.03, accent),
            "face": oklch(0.93, 0.035, hue + 0.05), "iris": oklch(0.80, 0.16, accent),
            "lid": oklch(light - 0.05, chroma, hue + 0.02), "ring": oklch(light - 0.25, 0.06, hue),
            "pupil": oklch(0.16, 0.03, hue), "beak": oklch(0.76, 0.16, 0.18)}


def draw_branch(s: Scene) -> None:
    middle = 0.80 + s.f["branch"] * s.x + 0.03 * np.sin(3 * s.x + 7 * s.f["x"])
    branch = np.abs(s.y - middle) - 0.075 + math.copysign(0.02, s.f["branch"]) * s.x
    s.branch = s.cover(branch)
    s.paint(s.branch, oklch(0.42, 0.06, 0.15), s.volume(branch, 0.09))


def draw_tail(s: Scene) -> None:
    """Draws the tail, behind the branch where that is there already."""
    x, y = rotate(s.x - s.f["x"], s.y, s.f["lean"], (0, 0.8))
    tail = ellipse(x, y, (0, 0.78), (0.17 * s.f["width"], 0.20))
    s.paint(s.cover(tail) * (1 - s.branch), s.colours["wing"], s.volume(tail, 0.15))


def draw_owl(s: Scene) -> None:
    f, colours, wide, scale = s.f, s.colours, s.f["width"], s.f["head"]
    x, y = rotate(s.x - f["x"], s.y, f["lean"], (0, 0.8))  # leans about its feet
    head_x, head_y = rotate(x, y, f["tilt"], (0, -0.05))
    head_x, head_y = head_x / scale, (head_y + 0.27) / scale  # the head's middle is 0
    body = ellipse(x, y, (0, 0.27), (0.45 * wide, 0.50))
    form = join(body, ellipse(head_x, head_y, (0, 0), (0.46, 0.37)) * scale, 0.12)
    glow = 0.35 * np.exp(-np.maximum(form, 0) / 0.07)  # separates the owl from a sky of its colour
    s.paint(glow, mix(s.light, s.sky[2], 0.5))
    if f["ears"] != "none":
        tip = EARS[f["ears"]]
        corners = [(0.12, -0.25), (0.40 + tip / 3, -0.33 - tip), (0.41, 0.0), (0.20, -0.03)]
        form = join(form, polygon(np.abs(head_x), head_y, corners) * scale, 0.07)
    lit = s.volume(form, 0.42)
    s.paint(s.cover(form), colours["body"], lit)
    breast = s.cover(ellipse(x, y, (0, 0.34), (0.31 * wide, 0.37)), 2)
    s.paint(breast, colours["breast"], lit)
    s.paint(breast * pattern(f["pattern"], x, y - 0.34, 0.15 * f["pattern_size"]), colours["mark"], lit)
    draw_wings(s, colours, x, y)
    draw_feet(s, colours)
    draw_face(s, colours, head_x - 0.10 * f["turn"], head_y, lit)


def draw_wings(s: Scene, colours: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray) -> None:
    """Each wing is three feathers that turn about the shoulder."""
    f, wide = s.f, s.f["width"]
    shoulder = (0.37 * wide, 0.0)
    left_x, left_y = rotate(-x, y, 0.10 - 1.45 * f["left_wing"], shoulder)
    right_x, right_y = rotate(x, y, 0.10 - 1.45 * f["right_wing"], shoulder)
    along_x, along_y = np.where(x < 0, left_x, right_x) - shoulder[0], np.where(x < 0, left_y, right_y)
    wing = ellipse(along_x, along_y, (0.02, 0.22), (0.145, 0.29))
    for angle, reach in ((-0.20, 0.55), (0.02, 0.60), (0.24, 0.56)):
        feather_x, feather_y = rotate(along_x, along_y, -angle, (0, 0))
        wing = join(wing, ellipse(feather_x, feather_y, (0.0, reach - 0.24), (0.10, 0.24)), 0.03)
    lit = s.volume(wing, 0.12)
    s.paint(s.cover(wing), colours["wing"], lit)
    tips = np.clip(0.5 + 12 * (length(along_x, along_y) - 0.43), 0, 1)
    s.paint(s.cover(wing) * tips * 0.8, colours["mark"], lit)


def draw_feet(s: Scene, colours: dict[str, np.ndarray]) -> None:
    side, down = np.abs(s.x - s.f["x"]), s.y - s.f["branch"] * s.x
    toes = [ellipse(side, down, (0.17 + step, 0.755), (0.032, 0.06)) for step in (-0.057, 0, 0.057)]
    feet = np.minimum.reduce(toes)
    s.paint(s.cover(feet), colours["beak"], s.volume(feet, 0.035))


def draw_face(s: Scene, colours: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray, lit: Planes) -> None:
    """Face disc, eyes and beak, in the head's coordinates."""
    f, side, radius = s.f, np.abs(x), 0.155 * s.f["eyes"]
    soft = mix(lit[0], 0.85, 0.3), lit[1]
    disc = ellipse(side, y, (0.185, 0.0), (0.225, 0.235))
    if f["face"] == "heart":
        disc = join(disc, ellipse(x, y, (0, 0.16), (0.15, 0.20)), 0.15)
    elif f["face"] == "round":
        disc = ellipse(x, y, (0, 0.01), (0.40, 0.27))
    s.paint(s.cover(disc, 2), colours["face"], soft)
    eye = length(side - 0.185, y) - radius
    s.paint(s.cover(eye - 0.02), colours["ring"])
    s.paint(s.cover(eye), colours["iris"])
    reach = 0.25 * radius * f["gaze_reach"]
    look_x = np.where(x < 0, x + 0.185, x - 0.185) - reach * math.cos(f["gaze"])
    look_y = y - reach * math.sin(f["gaze"])
    s.paint(s.cover(np.maximum(length(look_x, look_y) - 0.62 * radius, eye)), colours["pupil"])
    glint = length(look_x - math.copysign(0.05, f["sun"]), look_y + 0.05) - 0.04
    s.paint(s.cover(np.maximum(glint, eye)), oklch(1, 0, 0))
    lid = y + radius * (1 - 1.3 * f["lids"]) - f["mood"] * (side - 0.185)
    s.paint(s.cover(np.maximum(lid, eye - 0.02)), colours["lid"], lit)
    beak = polygon(x, y, [(-0.065, 0.06), (0, 0.02), (0.065, 0.06), (0, 0.21)])
    s.paint(s.cover(beak - 0.01), colours["beak"], soft)


def pixels(canvas: np.ndarray) -> np.ndarray:
    """Converts a canvas (3, size, size) in [0, 1] to uint8 (size, size, 3)."""
    return np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0).copy()


def draw(index: int, size: int = 128, seed: int = 0) -> np.ndarray:
    """Returns image `index` of the set, uint8 (size, size, 3), a function of its arguments."""
    scene = Scene(index, size, seed)
    for part in (draw_sky, draw_land, draw_tail, draw_branch, draw_owl):
        part(scene)
    return pixels(scene.canvas)
