"""The embedded sample set: drawings (not photographs) of hot dogs and of foods that look like them.

`make demo` needs pictures that are available offline and free to share, so this module draws them. Every
image is a pure function of (seed, split, label, index). Scores on these drawings show that the training code
works; they do not show how well a model recognises real food.

Both labels share one set of palettes, toppings, plates, backgrounds, props and lighting, so that only the
shape of the food tells them apart. Foods are drawn in local coordinates (x along the food from -1 to 1, y
across it) which a `Pose` places on the canvas; `Scene.fill` turns outlines into shaded, textured bodies.
"""

import json
import math
import os
import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter
from tqdm import tqdm

from hotdog_hf.data.folder import SAMPLE_MARKER as MARKER
from hotdog_hf.errors import UserError

GENERATOR_VERSION = 1  # raise whenever the drawings change, so that samples drawn earlier are redrawn
LABELS = ("hotdog", "not-hotdog")
OWN_FILES = re.compile(r"sample\.json|(train|test)/(hotdog|not-hotdog)/\d{4,}\.jpg")
JPEG_QUALITY = 85
DEEPEST = 28  # pixels: thicker bodies, such as plates, are flat inside and have a rim only
SUPERSAMPLE = 3  # outlines are rasterised this much larger and averaged down, which smooths their edges

Colour = tuple[float, float, float]
Palette = tuple[Colour, ...]
Shape = np.ndarray  # an outline: (points, 2), in local coordinates


def palette(codes: str) -> Palette:
    """Read colours written as #rrggbb."""
    return tuple(ImageColor.getrgb(code) for code in codes.split())


BREADS = palette("#ecc480 #deaa60 #cd924c #f2d49e #be8042")
CRUSTS = palette("#c47a34 #ac6228 #d08e42 #965424 #daa058")
CRUMBS = palette("#fceece #f6e2b8 #f0d8a8")
MEATS = palette("#b2442e #c85c3c #963a26 #d4704e #a45436 #843e28")
SAUCES = palette("#e6b41e #d89e14 #be1c14 #a81816 #f6eed6 #622e1a")
GREENS = palette("#70a034 #54882e #92b64e #42702c")
REDS = palette("#cc3426 #ba2822 #de4e34")
CHEESES = palette("#fac43e #f4b02c #fcde84")
ONIONS = palette("#f8f0e2 #ece0ce #cea0b2 #e8d6a0")
CHOCOLATES = palette("#4a2a1c #603822 #7a4c2e")
SKINS = palette("#f0c8aa #deac88 #b27c58 #764e36 #54382a")
WOODS = palette("#b08052 #885c38 #62422c #cca678 #a09280")
STONES = palette("#4a5056 #363a40 #686a6c #585250")
CLOTHS = palette("#c42c2c #345ca0 #3c8452 #deac3c #5a5a60 #965078")
PLAINS = palette("#e2d6c4 #96bac8 #ce6e54 #f2ce6e #6e8c6e #3c4054")
PLATES = palette("#f6f4ee #ece2ce #6084aa #464c52 #b24236 #a0bea0")
PAPERS = palette("#f6f2e8 #dec49a #cc3c32 #f0d678")
WHITE, BLACK = palette("#ffffff #000000")
STEEL, CHAR, NORI, PEEL, CARROT, HAM = palette("#c4c8ce #3a1c14 #1e2a24 #f4d046 #ec7e26 #e8968c")


@dataclass(frozen=True)
class Finish:
    """How a surface takes the light; lengths are relative to the thickness of the body."""

    depth: float = 0.35  # contrast between the lit and the dark side
    gloss: float = 0.0  # strength of the highlight
    grain: float = 0.06  # contrast of the surface texture
    shadow: float = 0.0  # darkness of the shadow that it drops
    alpha: float = 1.0


BREAD = Finish(depth=0.34, gloss=0.10, grain=0.06, shadow=0.45)
CASING = Finish(depth=0.42, gloss=0.55, grain=0.05, shadow=0.4)
SAUCE = Finish(depth=0.30, gloss=0.50, grain=0.02, shadow=0.25)
CRISP = Finish(depth=0.36, gloss=0.12, grain=0.10, shadow=0.4)
LEAF = Finish(depth=0.40, gloss=0.08, grain=0.14, shadow=0.3)
CHINA = Finish(depth=0.16, gloss=0.10, grain=0.01, shadow=0.4)
BAND = replace(CHINA, shadow=0)
PAPER = Finish(depth=0.12, grain=0.03, shadow=0.3)
METAL = Finish(depth=0.45, gloss=0.4, grain=0.0, shadow=0.4)
STAIN = Finish(depth=0.05, grain=0.10, alpha=0.6)


@dataclass(frozen=True)
class Pose:
    """Where a thing lies on the canvas, in pixels, and how it is turned, tilted and bent."""

    x: float
    y: float
    size: float
    angle: float = 0.0
    tilt: float = 1.0  # below 1 the thing is seen from the side, so that it looks narrower
    bend: float = 0.0

    def __call__(self, shape: Shape) -> np.ndarray:
        """Map local points to pixels."""
        along = shape[:, 0]
        across = (shape[:, 1] + self.bend * along**2) * self.tilt
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        turned = np.stack([along * cos - across * sin, along * sin + across * cos], axis=1)
        return turned * self.size + (self.x, self.y)

    def at(self, x: float, y: float, turn: float = 0.0, bend: float = 0.0) -> "Pose":
        """Give the pose of a part that lies at local (x, y)."""
        [(px, py)] = self(np.array([[x, y]]))
        return Pose(px, py, self.size, self.angle + turn, self.tilt, bend)


# --- Outlines -------------------------------------------------------------------------------------------


def oval(x: float, y: float, rx: float, ry: float, power: float = 2.0, turn: float = 0.0) -> Shape:
    """Outline a superellipse: an ellipse at power 2, ever closer to a box above."""
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    cos, sin = np.cos(t), np.sin(t)
    px = rx * np.sign(cos) * np.abs(cos) ** (2 / power)
    py = ry * np.sign(sin) * np.abs(sin) ** (2 / power)
    cos, sin = math.cos(turn), math.sin(turn)
    return np.stack([x + px * cos - py * sin, y + px * sin + py * cos], axis=1)


def bar(start: float, end: float, radius: float, y: float = 0.0, taper: float = 1.0) -> Shape:
    """Outline a round-ended bar along x, whose far end has `taper` times the radius of the near one."""
    near, far = np.linspace(math.pi / 2, 1.5 * math.pi, 12), np.linspace(-math.pi / 2, math.pi / 2, 12)
    x = np.linspace(start + radius, end - radius * taper, 20)
    half = np.linspace(radius, radius * taper, 20)
    caps = [
        np.stack([start + radius + radius * np.cos(near), y + radius * np.sin(near)], axis=1),
        np.stack([x, y - half], axis=1),
        np.stack([x[-1] + half[-1] * np.cos(far), y + half[-1] * np.sin(far)], axis=1),
        np.stack([x, y + half], axis=1)[::-1],
    ]
    return np.concatenate(caps)


def ribbon(x: np.ndarray, y: np.ndarray, width: float) -> list[Shape]:
    """Outline a line of sauce, a strand or a crack as overlapping segments with round joints."""
    points = np.stack([x, y], axis=1)
    steps = np.diff(points, axis=0)
    normals = np.stack([-steps[:, 1], steps[:, 0]], axis=1) / np.linalg.norm(steps, axis=1, keepdims=True)
    side = normals * width / 2
    pairs = zip(points[:-1], points[1:], side, strict=True)
    quads = [np.array([a - n, b - n, b + n, a + n]) for a, b, n in pairs]
    return quads + [oval(px, py, width / 2, width / 2) for px, py in points]


def ring(outer: float, inner: float) -> Shape:
    """Outline a disc with a hole, as one polygon with a seam."""
    rim, hole = oval(0, 0, outer, outer), oval(0, 0, inner, inner)
    return np.concatenate([rim, rim[:1], hole[:1], hole[::-1]])


def ragged(shape: Shape, rng: random.Random, amount: float) -> Shape:
    """Make an outline wavy, like a leaf or a patty."""
    t = np.linspace(0, 2 * math.pi, len(shape), endpoint=False)
    waves = sum(rng.uniform(0.4, 1) * np.sin(n * t + rng.uniform(0, 6.3)) for n in (3, 5, 8, 13)) / 4
    centre = shape.mean(axis=0)
    return centre + (shape - centre) * (1 + 2 * amount * waves[:, None])


def thickness(outline: np.ndarray) -> float:
    """Estimate how thick a body is from its area and the length of its outline."""
    following = np.roll(outline, -1, axis=0)
    area = abs(np.sum(outline[:, 0] * following[:, 1] - following[:, 0] * outline[:, 1])) / 2
    return float(2 * area / max(np.linalg.norm(following - outline, axis=1).sum(), 1e-6))


def rasterise(outlines: list[np.ndarray], window: tuple[int, int, int, int]) -> Image.Image:
    """Draw outlines into a smooth mask of the window."""
    left, top, right, bottom = window
    mask = Image.new("L", ((right - left) * SUPERSAMPLE, (bottom - top) * SUPERSAMPLE))
    pen = ImageDraw.Draw(mask)
    for outline in outlines:
        pen.polygon(((outline - (left, top)) * SUPERSAMPLE).ravel().tolist(), fill=255)
    return mask.reduce(SUPERSAMPLE)


def planes(colour: Colour) -> np.ndarray:
    """Shape a colour so that it combines with (channels, height, width) pixels."""
    return np.array(colour, np.float32)[:, None, None]


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Blend two colours."""
    return tuple(a + (b - a) * share for a, b in zip(first, second, strict=True))


# --- The canvas -----------------------------------------------------------------------------------------


class Scene:
    """A picture being drawn: its pixels, its light and its sources of chance."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.chance = np.random.default_rng(rng.getrandbits(64))
        long_side, aspect = rng.randint(200, 400), rng.choice((1.0, rng.uniform(0.6, 0.95)))
        sides = [long_side, round(long_side * aspect)]
        rng.shuffle(sides)
        self.width, self.height = sides
        # Channels come first because numpy combines pixels with a shade several times faster so.
        self.pixels = np.zeros((3, self.height, self.width), np.float32)
        angle = rng.uniform(0, 2 * math.pi)
        self.light = (math.cos(angle), math.sin(angle))

    def pick(self, colours: Palette) -> Colour:
        """Choose a colour from a palette and vary it a little."""
        brighter = self.rng.uniform(-14, 14)
        return tuple(c + brighter + self.rng.uniform(-6, 6) for c in self.rng.choice(colours))

    def noise(self, shape: tuple[int, int], cell_y: float, cell_x: float) -> np.ndarray:
        """Give smooth noise around zero whose spots have the given size in pixels."""
        height, width = shape
        coarse = (max(2, round(height / cell_y)), max(2, round(width / cell_x)))
        spots = Image.fromarray(self.chance.standard_normal(coarse, np.float32))
        return np.asarray(spots.resize((width, height), Image.Resampling.BICUBIC))

    def fill(
        self, pose: Pose, shapes: list[Shape], colour: Colour, finish: Finish, crown: Colour | None = None
    ) -> None:
        """Draw bodies as if domed and lit; `crown` is the colour at their middle, such as a browned top."""
        outlines = [pose(shape) for shape in shapes]
        # Where there are many bodies they are alike, and a ribbon ends with a disc of its own width.
        thick = max(thickness(outlines[0]), thickness(outlines[-1]), 1.0)
        window = self._window(outlines, margin=1.3 * min(thick, DEEPEST) if finish.shadow else 1)
        if window is None:
            return
        left, top, right, bottom = window
        under = self.pixels[:, top:bottom, left:right]
        mask = rasterise(outlines, window)
        if finish.shadow:
            under *= 1 - finish.shadow * self._shadow(mask, min(thick, DEEPEST))
        cover = np.asarray(mask, np.float32) * (finish.alpha / 255)
        under += (self._shade(mask, thick, colour, finish, crown) - under) * cover

    def _window(self, outlines: list[np.ndarray], margin: float) -> tuple[int, int, int, int] | None:
        """Bound the outlines within the frame, or give None where they lie outside it."""
        points = np.concatenate(outlines)
        left, top = np.maximum(np.floor(points.min(axis=0) - margin), 0).astype(int)
        right, bottom = np.ceil(points.max(axis=0) + margin).astype(int)
        right, bottom = min(right, self.width), min(bottom, self.height)
        return (left, top, right, bottom) if right - left > 1 and bottom - top > 1 else None

    def _shadow(self, mask: Image.Image, thick: float) -> np.ndarray:
        """Cast the shadow of a body to the side away from the light, from 0 to 1."""
        reach = 0.35 * thick
        shift = (1, 0, reach * self.light[0], 0, 1, reach * self.light[1])
        shifted = mask.transform(mask.size, Image.Transform.AFFINE, shift)
        return np.asarray(shifted.filter(ImageFilter.GaussianBlur(0.4 * thick)), np.float32) / 255

    def _shade(
        self, mask: Image.Image, thick: float, colour: Colour, finish: Finish, crown: Colour | None
    ) -> np.ndarray:
        """Colour a body by its relief, for which the blurred mask stands, and by its texture."""
        soft = min(max(0.45 * thick, 0.6), DEEPEST / 2)
        dome = np.asarray(mask.filter(ImageFilter.GaussianBlur(soft)), np.float32) / 255
        slope_y, slope_x = np.gradient(dome)
        # A blurred edge has the slope 0.4 / soft, so this is about 1 on the edge that faces the light.
        facing = -2.5 * soft * (slope_x * self.light[0] + slope_y * self.light[1])
        spot = 0.3 * thick + 2
        texture = self.noise(dome.shape, spot, spot) + 0.6 * self.noise(dome.shape, 2, 2)
        body = planes(colour)
        if crown is not None:
            body = body + (planes(crown) - body) * np.clip(2.2 * dome - 1.1 + 0.08 * texture, 0, 1)
        body = body * ((0.78 + 0.24 * dome) * (1 + finish.depth * facing) * (1 + finish.grain * texture))
        if finish.gloss:
            highlight = np.exp(-(((facing - 0.5) / 0.18) ** 2)) * np.clip(0.7 + 0.4 * texture, 0, 1)
            body += (250 - body) * (finish.gloss * highlight)
        return body

    def develop(self) -> Image.Image:
        """Take the picture: tint, exposure, vignette, slight blur and sensor noise."""
        rng = self.rng
        warmth, exposure = rng.uniform(-0.09, 0.12), rng.uniform(0.84, 1.14)
        y, x = np.linspace(-1, 1, self.height)[:, None], np.linspace(-1, 1, self.width)
        falloff = 1 - rng.uniform(0, 0.22) * (x**2 + y**2)
        slant = 1 + rng.uniform(0, 0.16) * (x * self.light[0] + y * self.light[1])
        tint = planes((1 + warmth, 1, 1 - warmth))
        self.pixels *= (exposure * falloff * slant).astype(np.float32) * tint
        channels = [Image.fromarray(np.clip(channel, 0, 255).astype(np.uint8)) for channel in self.pixels]
        picture = Image.merge("RGB", channels).filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.8)))
        speckle = self.chance.standard_normal((self.height, self.width, 3), np.float32)
        return Image.fromarray(np.clip(picture + rng.uniform(0.5, 5) * speckle, 0, 255).astype(np.uint8))


Part = Callable[[Scene, Pose], None]  # draws one thing


# --- Backgrounds ----------------------------------------------------------------------------------------


def turned_grid(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Give the pixel coordinates in a randomly turned frame."""
    angle = scene.rng.choice((0, math.pi / 2, scene.rng.uniform(0, math.pi)))
    y, x = np.mgrid[: scene.height, : scene.width].astype(np.float32)
    return x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)


def wood(scene: Scene) -> None:
    """Lay planks with grain and dark joints."""
    upright = scene.rng.random() < 0.5
    height, width = (scene.width, scene.height) if upright else (scene.height, scene.width)
    plank = scene.rng.uniform(36, 80)
    row = np.arange(height)[:, None] / plank
    tone = scene.chance.normal(1, 0.09, math.ceil(height / plank) + 1)[np.floor(row).astype(int)]
    grain = 0.05 * scene.noise((height, width), 2, 60) + 0.05 * scene.noise((height, width), 7, 120)
    shade = tone + grain - 0.4 * (row % 1 < 2.2 / plank)
    scene.pixels[:] = planes(scene.pick(WOODS)) * (shade.T if upright else shade)


def checks(scene: Scene) -> None:
    """Spread a checked tablecloth."""
    u, v = turned_grid(scene)
    step = scene.rng.uniform(14, 40)
    share = ((u // step) % 2 + (v // step) % 2) / 2
    weave = 1 + 0.03 * scene.noise(u.shape, 1, 1) + 0.05 * scene.noise(u.shape, 50, 50)
    white, dye = planes(scene.pick(PAPERS[:1])), planes(scene.pick(CLOTHS))
    scene.pixels[:] = (white + (dye - white) * share) * weave


def slate(scene: Scene) -> None:
    """Lay a rough dark stone."""
    rough = sum(0.05 * scene.noise(scene.pixels.shape[1:], cell, 2 * cell) for cell in (1, 4, 16, 50))
    scene.pixels[:] = planes(scene.pick(STONES)) * (1 + rough)


def marble(scene: Scene) -> None:
    """Lay a pale stone with veins."""
    u, _ = turned_grid(scene)
    warp = sum(cell * 0.5 * scene.noise(u.shape, cell, cell) for cell in (10, 30, 80))
    veins = np.exp(-12 * np.abs(np.sin((u + warp) / scene.rng.uniform(30, 60))))
    scene.pixels[:] = planes(scene.pick(PLATES[:2])) * (1 - 0.35 * veins)


def grass(scene: Scene) -> None:
    """Grow a lawn of blades in several greens."""
    scene.pixels[:] = planes(scene.pick(GREENS)) * 0.6
    blade = Finish(depth=0.3, grain=0.1, alpha=0.85)
    whole = Pose(0, 0, 1)
    for _ in range(6):
        roots = scene.chance.uniform((0, 0), (scene.width, scene.height), (140, 2))
        tips = roots + scene.chance.normal((0, -12), (5, 5), roots.shape)
        blades = [np.array([a - (1.3, 0), b, a + (1.3, 0)]) for a, b in zip(roots, tips, strict=True)]
        scene.fill(whole, blades, scene.pick(GREENS), blade)


def plain(scene: Scene) -> None:
    """Fade between two shades of one colour."""
    u, _ = turned_grid(scene)
    near = planes(scene.pick(PLAINS))
    far = near * scene.rng.uniform(0.6, 0.9)
    share = (u - u.min()) / np.ptp(u)
    scene.pixels[:] = near + (far - near) * share + 2 * scene.noise(u.shape, 20, 20)


def paper(scene: Scene) -> None:
    """Line the picture with creased paper."""
    u, v = turned_grid(scene)
    folds = sum(np.sign(np.sin((a * u + b * v) / 70)) for a, b in scene.chance.uniform(-1, 1, (4, 2)))
    creases = 0.95 + 0.02 * folds + 0.02 * scene.noise(u.shape, 3, 3)
    scene.pixels[:] = planes(scene.pick(PAPERS)) * creases


BACKGROUNDS = (wood, checks, slate, marble, grass, plain, paper)


# --- Plates, trays and other objects --------------------------------------------------------------------


def plate(scene: Scene, pose: Pose) -> None:
    """Put a round, oval or squarish plate with a rim under the food."""
    rng = scene.rng
    colour, wide, power = scene.pick(PLATES), rng.uniform(0.75, 1.0), rng.choice((2, 2, 2.6, 5))
    scene.fill(pose, [oval(0, 0, 1, wide, power)], colour, CHINA)
    if rng.random() < 0.4:
        scene.fill(pose, [oval(0, 0, 0.95, 0.95 * wide, power)], scene.pick(CLOTHS), BAND)
        scene.fill(pose, [oval(0, 0, 0.89, 0.89 * wide, power)], colour, BAND)
    hollow = oval(0, 0, 0.7, 0.7 * wide, power)
    scene.fill(pose, [hollow], mix(colour, WHITE, 0.2), replace(CHINA, shadow=0.15))


def tray(scene: Scene, pose: Pose) -> None:
    """Put a paper tray or board with a raised edge under the food."""
    colour, wide = scene.pick(PAPERS + WOODS), scene.rng.uniform(0.5, 0.75)
    scene.fill(pose, [oval(0, 0, 1, wide, 7)], mix(colour, BLACK, 0.15), CHINA)
    scene.fill(pose, [oval(0, 0, 0.92, wide - 0.08, 7)], colour, PAPER)


def napkin(scene: Scene, pose: Pose) -> None:
    """Lay a folded napkin."""
    colour = scene.pick(CLOTHS + PAPERS)
    scene.fill(pose, [oval(0, 0, 1, 0.8, 12)], colour, PAPER)
    fold = np.array([[-0.95, -0.75], [0.95, -0.75], [0.95, 0.75]])
    scene.fill(pose, [fold], mix(colour, WHITE, 0.25), PAPER)


def fork(scene: Scene, pose: Pose) -> None:
    """Lay a fork."""
    tines = [bar(0.35, 1.1, 0.03, y) for y in (-0.13, -0.045, 0.045, 0.13)]
    scene.fill(pose, [bar(-1.2, 0.3, 0.06), oval(0.35, 0, 0.2, 0.17, 3), *tines], STEEL, METAL)


def knife(scene: Scene, pose: Pose) -> None:
    """Lay a knife."""
    scene.fill(pose, [bar(-0.1, 1.2, 0.11, taper=0.5)], STEEL, METAL)
    scene.fill(pose, [bar(-1.2, 0, 0.1)], scene.pick(WOODS), CASING)


def cup(scene: Scene, pose: Pose) -> None:
    """Stand a cup of some drink, seen from above."""
    scene.fill(pose, [oval(0, 0, 0.8, 0.8), oval(0.9, 0, 0.22, 0.14)], scene.pick(PLATES), CHINA)
    scene.fill(pose, [oval(0, 0, 0.66, 0.66)], scene.pick(CHOCOLATES + SAUCES), replace(SAUCE, gloss=0.3))


def bottle(scene: Scene, pose: Pose) -> None:
    """Lay a bottle of sauce."""
    colour = scene.pick(SAUCES)
    scene.fill(pose, [bar(0.3, 1.3, 0.13, taper=0.4)], mix(colour, BLACK, 0.3), CASING)
    scene.fill(pose, [oval(-0.35, 0, 0.9, 0.38, 4)], colour, CASING)
    scene.fill(pose, [oval(-0.4, 0, 0.4, 0.37, 6)], scene.pick(PAPERS), PAPER)


def table_edge(scene: Scene, pose: Pose) -> None:
    """End the table in a dark room."""
    scene.fill(pose, [oval(0, 1.6, 6, 1.5, 30)], scene.pick(STONES + WOODS), replace(PAPER, shadow=0.6))


def fingers(scene: Scene, pose: Pose) -> None:
    """Let a hand reach over the food from beyond its edge."""
    rng = scene.rng
    skin, side, start = scene.pick(SKINS), rng.choice((-1, 1)), rng.uniform(-0.5, 0.1)
    soft, flush = replace(BREAD, grain=0.03), mix(skin, REDS[2], 0.12)
    hand = pose.at(start + 0.34, 1.55 * side, turn=-side * math.pi / 2 + rng.uniform(-0.2, 0.2))
    scene.fill(hand, [bar(-3, 0.2, 0.36)], skin, soft, flush)
    for number in (-1.5, -0.5, 0.5, 1.5):
        reach = 1.35 - 0.07 * abs(number) + rng.uniform(-0.08, 0.08)
        scene.fill(hand, [bar(-0.3, reach, 0.12, 0.22 * number, 0.85)], skin, soft, flush)
        nail = oval(reach - 0.1, 0.22 * number, 0.07, 0.06, 3)
        scene.fill(hand, [nail], mix(skin, (255, 235, 230), 0.45), SAUCE)


PROPS = (napkin, fork, knife, cup, bottle, table_edge)


# --- Toppings -------------------------------------------------------------------------------------------


def squiggle(scene: Scene, pose: Pose, reach: float, height: float) -> None:
    """Squeeze a zigzag, a wave or a straight line of sauce."""
    rng = scene.rng
    x = np.linspace(-reach, reach, 70)
    phase = x * rng.uniform(9, 22) + rng.uniform(0, 6)
    wave = rng.choice((np.sin(phase), 2 / math.pi * np.arcsin(np.sin(phase)), 0.15 * np.sin(phase)))
    line = ribbon(x, wave * height * rng.uniform(0.5, 0.9), rng.uniform(0.045, 0.08))
    scene.fill(pose, line, scene.pick(SAUCES), SAUCE)


def scatter(
    scene: Scene, pose: Pose, area: tuple[float, float], colours: Palette, count: int, size: float
) -> None:
    """Sprinkle small pieces over an oval area, in two shades."""
    rng = scene.rng
    for _ in range(2):
        pieces = []
        for _ in range(count // 2):
            angle, far = rng.uniform(0, 2 * math.pi), math.sqrt(rng.random())
            x, y = area[0] * far * math.cos(angle), area[1] * far * math.sin(angle)
            pieces.append(oval(x, y, size * rng.uniform(0.7, 1.2), size / 1.5, 2.6, rng.uniform(0, math.pi)))
        scene.fill(pose, pieces, scene.pick(colours), LEAF)


def onions(scene: Scene, pose: Pose, reach: float, height: float) -> None:
    """Sprinkle diced onion."""
    scatter(scene, pose, (reach, height), ONIONS, scene.rng.randint(30, 60), 0.045)


def relish(scene: Scene, pose: Pose, reach: float, height: float) -> None:
    """Spoon on green relish."""
    scatter(scene, pose, (reach, height), GREENS, scene.rng.randint(50, 80), 0.045)


def chili(scene: Scene, pose: Pose, reach: float, height: float) -> None:
    """Ladle on chili with beans and mince."""
    bed = ragged(oval(0, 0, reach, height, 3), scene.rng, 0.06)
    scene.fill(pose, [bed], scene.pick(MEATS), CRISP)
    scatter(scene, pose, (reach, 0.9 * height), MEATS + CHOCOLATES, 50, 0.05)


def strands(scene: Scene, pose: Pose, reach: float, height: float) -> None:
    """Strew sauerkraut, grated cheese or fried onion."""
    rng = scene.rng
    colours = rng.choice((ONIONS, CHEESES, CRUMBS))
    for _ in range(3):
        pieces: list[Shape] = []
        for _ in range(12):
            x, turn, half = rng.uniform(-reach, reach), rng.uniform(0, math.pi), rng.uniform(0.06, 0.14)
            t = np.linspace(-half, half, 4)
            curl = rng.uniform(-4, 4) * t**2
            y = rng.uniform(-height, height) * 0.7
            pieces += ribbon(x + t * math.cos(turn), y + t * math.sin(turn) + curl, 0.028)
        scene.fill(pose, pieces, scene.pick(colours), LEAF)


def jalapenos(scene: Scene, pose: Pose, reach: float, height: float) -> None:
    """Lay rings of jalapeno in a row."""
    green = scene.pick(GREENS)
    for x in np.linspace(-reach, reach, scene.rng.randint(4, 7)):
        slice_pose = pose.at(x, scene.rng.uniform(-0.3, 0.3) * height)
        scene.fill(slice_pose, [oval(0, 0, 0.085, 0.085)], mix(green, (235, 240, 190), 0.6), LEAF)
        scene.fill(slice_pose, [ring(0.1, 0.07)], green, SAUCE)


def melted_cheese(scene: Scene, pose: Pose, reach: float, height: float) -> None:
    """Melt a slice of cheese on top."""
    slab = ragged(oval(0, 0, reach, 1.2 * height, 4), scene.rng, 0.08)
    scene.fill(pose, [slab], scene.pick(CHEESES), SAUCE)


TOPPINGS = (squiggle, squiggle, squiggle, onions, relish, chili, strands, jalapenos, melted_cheese)


def dress(scene: Scene, pose: Pose, reach: float, height: float) -> None:
    """Add none, one or two toppings."""
    for topping in scene.rng.sample(TOPPINGS, scene.rng.choice((0, 1, 1, 1, 2, 2))):
        topping(scene, pose, reach, height)


def lettuce(scene: Scene, pose: Pose, reach: float, height: float) -> None:
    """Lay frilly leaves."""
    for x in np.linspace(-reach, reach, 4):
        leaf = ragged(oval(x, 0, 0.4 * reach, height), scene.rng, 0.14)
        green = scene.pick(GREENS)
        scene.fill(pose, [leaf], green, LEAF, mix(green, (230, 240, 170), 0.4))


def sesame(scene: Scene, pose: Pose, area: tuple[float, float]) -> None:
    """Sprinkle sesame on bread."""
    scatter(scene, pose, area, CRUMBS, scene.rng.randint(16, 40), 0.028)


# --- Foods ----------------------------------------------------------------------------------------------


def sausage(scene: Scene, pose: Pose, reach: float, radius: float) -> None:
    """Draw one glossy sausage, perhaps with grill marks."""
    rng = scene.rng
    colour = scene.pick(MEATS)
    scene.fill(pose, [bar(-reach, reach, radius)], colour, CASING, mix(colour, (255, 170, 110), 0.18))
    if rng.random() < 0.5:
        slant, half = rng.uniform(-0.6, 0.6), np.linspace(-0.8, 0.8, 3) * radius
        for x in np.linspace(-0.75 * reach, 0.75 * reach, rng.randint(4, 7)):
            scene.fill(pose, ribbon(x + slant * half, half, 0.035), CHAR, STAIN)
    scene.fill(pose, [oval(end * (reach - 0.03), 0, 0.03, 0.03) for end in (-1, 1)], CHAR, STAIN)


def bun(scene: Scene, pose: Pose, filling: Part | None, topping: Part | None = None) -> None:
    """Draw a split bun, seen from above or from slightly in front, around a filling and under a topping."""
    rng = scene.rng
    bread, crust = scene.pick(BREADS), scene.pick(CRUSTS)
    half, reach, lean = rng.uniform(0.17, 0.23), rng.uniform(0.8, 0.9), rng.uniform(0, 0.1)
    inside = pose.at(0, -lean, bend=pose.bend)
    scene.fill(pose, [oval(0, -0.08 - half, reach, half, 3)], bread, BREAD, crust)
    scene.fill(inside, [oval(0, 0, 0.94 * reach, 0.2, 3)], scene.pick(CRUMBS), replace(BREAD, shadow=0))
    if filling is not None:
        filling(scene, inside)
    scene.fill(inside, [oval(0, 0.08 + half, reach, half, 3)], bread, BREAD, crust)
    if rng.random() < 0.3:
        for y in (-0.08 - half, 0.08 + half):
            sesame(scene, pose.at(0, y, bend=pose.bend), (0.85 * reach, 0.7 * half))
    if topping is not None:
        topping(scene, inside)


def hotdog(scene: Scene, pose: Pose) -> None:
    """Draw a sausage in a split bun with toppings."""
    radius, reach = scene.rng.uniform(0.14, 0.19), scene.rng.uniform(0.88, 1.05)

    def filling(scene: Scene, pose: Pose) -> None:
        if scene.rng.random() < 0.25:
            lettuce(scene, pose, 0.8, 0.26)
        sausage(scene, pose, reach, radius)

    bun(scene, pose, filling, partial(dress, reach=0.8, height=0.8 * radius))


def empty_bun(scene: Scene, pose: Pose) -> None:
    """Draw a bun that holds nothing but, at times, sauce or leaves."""
    dressing = scene.rng.choice((squiggle, strands, onions, lettuce, relish, None, None, None))
    bun(scene, pose, dressing and partial(dressing, reach=0.75, height=0.12))


def sub(scene: Scene, pose: Pose) -> None:
    """Draw a long sandwich with salad, cheese and ham."""

    def filling(scene: Scene, pose: Pose) -> None:
        lettuce(scene, pose, 0.75, 0.3)
        meat = scene.pick((HAM, *MEATS))
        for x in np.linspace(-0.65, 0.65, scene.rng.randint(4, 6)):
            scene.fill(pose, [ragged(oval(x, 0.02, 0.18, 0.2), scene.rng, 0.08)], meat, LEAF)
            scene.fill(pose, [oval(x + 0.09, 0, 0.13, 0.15)], scene.pick(REDS + CHEESES), SAUCE)

    # Only sauce on top: anything that hid the filling would leave the label open to doubt.
    bun(scene, pose, filling, scene.rng.choice((None, partial(squiggle, reach=0.7, height=0.12))))


def sausages(scene: Scene, pose: Pose) -> None:
    """Draw plain sausages side by side, without any bun."""
    rng = scene.rng
    for y in rng.choice(((-0.2, 0.2), (-0.4, 0, 0.4))):
        link = pose.at(0, y, turn=rng.uniform(-0.1, 0.1), bend=rng.uniform(-0.15, 0.15))
        sausage(scene, link, 0.85, 0.17)
    dress(scene, pose, 0.6, 0.14)


def corn_dog(scene: Scene, pose: Pose) -> None:
    """Draw a battered sausage on a stick."""
    scene.fill(pose, [bar(-1.1, 0, 0.045)], scene.pick(WOODS), PAPER)
    batter = ragged(bar(-0.55, 0.95, 0.23), scene.rng, 0.01)
    scene.fill(pose, [batter], scene.pick(CRUSTS), replace(CRISP, gloss=0.2), scene.pick(CRUSTS + BREADS))
    squiggle(scene, pose.at(0.2, 0, bend=pose.bend), 0.65, 0.14)


def baguette(scene: Scene, pose: Pose) -> None:
    """Draw a crusty loaf with floury slashes."""
    rng = scene.rng
    radius = rng.uniform(0.2, 0.3)
    scene.fill(pose, [oval(0, 0, 1, radius, 2.6)], scene.pick(BREADS), CRISP, scene.pick(CRUSTS))
    for x in np.linspace(-0.65, 0.65, rng.randint(3, 6)):
        slash = oval(x, 0, 0.19, 0.05, 1.6, 0.5)
        scene.fill(pose, [slash], scene.pick(CRUMBS + BREADS), replace(CRISP, shadow=0.2))


def croissant(scene: Scene, pose: Pose) -> None:
    """Draw a curved roll of overlapping layers."""
    bent = replace(pose, bend=scene.rng.choice((-1, 1)) * scene.rng.uniform(0.3, 0.6))
    bread, crust = scene.pick(BREADS), scene.pick(CRUSTS)
    for x in (0.82, 0.62, 0.42, 0.21, 0):
        for side in (-1, 1) if x else (1,):
            layer = oval(side * x, 0, 0.2, 0.36 * (1 - 0.75 * x), 2.4, side * 0.2)
            scene.fill(bent, [layer], bread, replace(CRISP, gloss=0.3), crust)


def eclair(scene: Scene, pose: Pose) -> None:
    """Draw a filled bun with a glossy glaze."""
    scene.fill(pose, [bar(-0.9, 0.9, 0.29)], scene.pick(BREADS), BREAD, scene.pick(CRUSTS))
    glaze = ragged(bar(-0.82, 0.82, 0.2), scene.rng, 0.015)
    scene.fill(pose, [glaze], scene.pick(CHOCOLATES * 2 + MEATS + CHEESES), replace(SAUCE, gloss=0.6))
    if scene.rng.random() < 0.6:
        squiggle(scene, pose, 0.7, 0.13)


def banana(scene: Scene, pose: Pose) -> None:
    """Draw a curved fruit with ridges, spots and a stem."""
    rng = scene.rng
    bent = replace(pose, bend=rng.choice((-1, 1)) * rng.uniform(0.25, 0.5))
    peel = mix(PEEL, scene.pick(GREENS + CRUSTS), rng.uniform(0, 0.35))
    scene.fill(bent, [bar(0.8, 1.08, 0.05)], mix(peel, CHAR, 0.4), PAPER)
    scene.fill(bent, [oval(0, 0, 0.95, 0.22, 2.5)], peel, replace(BREAD, gloss=0.25))
    x = np.linspace(-0.85, 0.85, 16)
    scene.fill(bent, ribbon(x, 0.07 * (1 - x**2), 0.02), mix(peel, CHAR, 0.5), STAIN)
    places = [(rng.uniform(-0.8, 0.8), rng.uniform(-0.13, 0.13)) for _ in range(9)]
    spots = [oval(x, y, rng.uniform(0.01, 0.05), 0.015) for x, y in places]
    scene.fill(bent, [*spots, oval(-0.93, 0, 0.04, 0.05)], CHAR, STAIN)


def burger(scene: Scene, pose: Pose) -> None:
    """Draw a burger, from above or from the side."""
    scene.rng.choice((burger_from_above, burger_from_the_side))(scene, pose)


def burger_from_above(scene: Scene, pose: Pose) -> None:
    """Draw the top of a burger with the edges of its layers."""
    rng = scene.rng
    cheese = oval(0.03, 0.03, 0.58, 0.58, 5, rng.uniform(0, 1.5))
    scene.fill(pose, [ragged(oval(0, 0, 0.66, 0.66), rng, 0.06)], scene.pick(GREENS), LEAF)
    scene.fill(pose, [cheese], scene.pick(CHEESES), SAUCE)
    scene.fill(pose, [ragged(oval(0, 0, 0.6, 0.6), rng, 0.02)], scene.pick(MEATS), CRISP)
    scene.fill(pose, [oval(-0.03, -0.03, 0.57, 0.57)], scene.pick(BREADS), BREAD, scene.pick(CRUSTS))
    sesame(scene, pose, (0.42, 0.42))


def burger_from_the_side(scene: Scene, pose: Pose) -> None:
    """Draw the layers of a burger as a stack."""
    bread, crust = scene.pick(BREADS), scene.pick(CRUSTS)
    cheese = np.array([[-0.7, 0.03], [0.7, 0.03], [0.45, 0.22], [0.2, 0.1], [-0.1, 0.3]])
    top = oval(0, -0.1, 0.7, 0.48, 2.3)
    scene.fill(pose, [oval(0, 0.38, 0.68, 0.2, 3.5)], bread, BREAD, crust)
    scene.fill(pose, [ragged(bar(-0.72, 0.72, 0.15, 0.2), scene.rng, 0.02)], scene.pick(MEATS), CRISP)
    scene.fill(pose, [cheese], scene.pick(CHEESES), SAUCE)
    scene.fill(pose, [bar(-0.62, 0.62, 0.07)], scene.pick(REDS + SAUCES), SAUCE)
    lettuce(scene, pose.at(0, -0.05), 0.6, 0.1)
    scene.fill(pose, [top[top[:, 1] < -0.08]], bread, BREAD, crust)
    sesame(scene, pose.at(0, -0.33), (0.4, 0.14))


def taco(scene: Scene, pose: Pose) -> None:
    """Draw a folded shell with its filling along the open edge."""
    rng = scene.rng
    shell = scene.pick(BREADS + CHEESES[:1])
    disc = oval(0, 0.3, 0.85, 0.85)
    half = disc[disc[:, 1] < 0.3]
    scene.fill(pose, [half - (0.05, 0.1)], mix(shell, CHAR, 0.15), CRISP)
    t = np.linspace(3.5, 5.9, 9)
    rim = list(zip(0.82 * np.cos(t), 0.3 + 0.82 * np.sin(t), strict=True))
    for filling in (GREENS, MEATS, REDS, CHEESES, GREENS):
        bits = [oval(x, y, 0.13, 0.07, 2, rng.uniform(0, 3)) for x, y in rng.sample(rim, 6)]
        scene.fill(pose, [ragged(bit, rng, 0.15) for bit in bits], scene.pick(filling), LEAF)
    scene.fill(pose, [half * (0.97, 0.92) + (0.03, 0.07)], shell, CRISP, scene.pick(BREADS + CRUSTS))


def pizza(scene: Scene, pose: Pose) -> None:
    """Draw a whole pizza or one slice of it."""
    rng = scene.rng
    crust, edge = scene.pick(BREADS), scene.pick(CRUSTS)
    if rng.random() < 0.5:
        scene.fill(pose, [ragged(oval(0, 0, 0.75, 0.75), rng, 0.02)], crust, BREAD, edge)
        outline, spread = ragged(oval(0, 0, 0.62, 0.62), rng, 0.03), (0.5, 0.5)
    else:
        scene.fill(pose, [bar(-0.5, 0.5, 0.12)[:, ::-1] + (-0.75, 0)], crust, BREAD, edge)
        outline, spread = np.array([[-0.7, -0.45], [0.95, 0], [-0.7, 0.45]]), (0.4, 0.17)
    scene.fill(pose, [outline], scene.pick(REDS), SAUCE)
    scene.fill(pose, [outline * 0.95], scene.pick(CHEESES), replace(SAUCE, grain=0.12), scene.pick(CHEESES))
    for angle in np.linspace(0, 2 * math.pi, rng.randint(5, 8)):
        x, y = spread[0] * math.cos(angle) * rng.uniform(0.3, 1), spread[1] * math.sin(angle)
        scene.fill(pose, [oval(x - 0.05, y, 0.12, 0.12)], scene.pick(MEATS + REDS), SAUCE)
    scatter(scene, pose, spread, rng.choice((GREENS, ONIONS)), 16, 0.04)


def doughnut(scene: Scene, pose: Pose) -> None:
    """Draw a glazed ring with sprinkles."""
    rng = scene.rng
    scene.fill(pose, [ring(0.66, 0.2)], scene.pick(BREADS), BREAD, scene.pick(CRUSTS))
    scene.fill(pose, [ring(0.58, 0.27)], scene.pick(CHOCOLATES + MEATS + ONIONS + SAUCES), SAUCE)
    for _ in range(4):
        places = [(rng.uniform(0, 6.3), rng.uniform(0.34, 0.52)) for _ in range(10)]
        sprinkles = [oval(r * math.cos(a), r * math.sin(a), 0.04, 0.014, 3, 7 * a) for a, r in places]
        scene.fill(pose, sprinkles, scene.pick(CLOTHS + SAUCES), SAUCE)


def sushi(scene: Scene, pose: Pose) -> None:
    """Draw a row of rolls or of fish on rice."""
    rng = scene.rng
    nigiri, fish = rng.random() < 0.5, scene.pick((CARROT, *REDS, *MEATS[:4]))
    for x in np.linspace(-0.72, 0.72, 4):
        piece = pose.at(x, rng.uniform(-0.05, 0.05), turn=rng.uniform(-0.1, 0.1) + math.pi / 2)
        if nigiri:
            scene.fill(piece, [bar(-0.44, 0.44, 0.19)], CRUMBS[0], CRISP)
            scene.fill(piece, [oval(0, 0, 0.46, 0.14, 4)], fish, SAUCE)
            for x in (-0.25, -0.05, 0.15):
                stripe = ribbon(np.array([x, x + 0.1]), np.array([-0.12, 0.12]), 0.02)
                scene.fill(piece, stripe, ONIONS[0], STAIN)
        else:
            scene.fill(piece, [oval(0, 0, 0.23, 0.23)], NORI, CASING)
            scene.fill(piece, [oval(0, 0, 0.2, 0.2)], CRUMBS[0], CRISP)
            scene.fill(piece, [oval(0, 0, 0.09, 0.09, 3)], fish, SAUCE)


def fries(scene: Scene, pose: Pose) -> None:
    """Draw a heap of fries with sauce."""
    rng = scene.rng
    for _ in range(26):
        stick = pose.at(rng.uniform(-0.5, 0.5), rng.uniform(-0.3, 0.3), turn=rng.uniform(-0.7, 0.7))
        length = rng.uniform(0.25, 0.5)
        scene.fill(stick, [oval(0, 0, length, 0.055, 9)], scene.pick(BREADS + CHEESES), BREAD)
    dress(scene, pose, 0.5, 0.2)


def vegetables(scene: Scene, pose: Pose) -> None:
    """Draw a carrot or a cucumber with slices of it."""
    rng = scene.rng
    carrot = rng.random() < 0.5
    skin = mix(CARROT, scene.pick(MEATS), 0.2) if carrot else scene.pick(GREENS)
    if carrot:
        tops = [oval(-1, y, 0.22, 0.05, 2, turn) for y, turn in ((-0.08, 0.5), (0, 0), (0.08, -0.5))]
        scene.fill(pose, tops, scene.pick(GREENS), LEAF)
    scene.fill(pose, [bar(-0.9, 0.95, 0.22, taper=0.25 if carrot else 0.9)], skin, CASING)
    half = np.linspace(-0.1, 0.1, 3)
    for x in np.linspace(-0.6, 0.6, 8):
        line = ribbon(x + half * rng.uniform(-0.3, 0.3), half * rng.uniform(0.3, 1), 0.02)
        scene.fill(pose, line, CHAR, STAIN)
    for x in np.linspace(-0.5, 0.5, rng.randint(2, 4)):
        slice_pose = pose.at(x, 0.42 + rng.uniform(-0.05, 0.05))
        scene.fill(slice_pose, [oval(0, 0, 0.19, 0.19)], skin, CASING)
        scene.fill(slice_pose, [oval(0, 0, 0.16, 0.16)], mix(skin, (255, 240, 180), 0.45), BREAD)


def spring_rolls(scene: Scene, pose: Pose) -> None:
    """Draw crisp rolls beside a bowl of dip."""
    rng = scene.rng
    for y in np.linspace(-0.4, 0.4, rng.randint(2, 3)):
        roll = pose.at(0, y, turn=rng.uniform(-0.15, 0.15))
        scene.fill(roll, [oval(0, 0, 0.75, 0.18, 6)], scene.pick(CRUSTS), CRISP, scene.pick(BREADS))
        edge = np.linspace(-0.15, 0.15, 4)
        scene.fill(roll, ribbon(0.4 - edge, edge, 0.025), CHAR, STAIN)
    if rng.random() < 0.6:
        scene.fill(pose.at(1, 0), [oval(0, 0, 0.3, 0.3)], scene.pick(PLATES), CHINA)
        scene.fill(pose.at(1, 0), [oval(0, 0, 0.24, 0.24)], scene.pick(SAUCES), SAUCE)


LOOKALIKES: dict[str, Part] = {
    "baguette": baguette,
    "banana": banana,
    "burger": burger,
    "corn dog": corn_dog,
    "croissant": croissant,
    "doughnut": doughnut,
    "eclair": eclair,
    "empty bun": empty_bun,
    "fries": fries,
    "pizza": pizza,
    "plain sausages": sausages,
    "spring rolls": spring_rolls,
    "sub": sub,
    "sushi": sushi,
    "taco": taco,
    "vegetables": vegetables,
}


# --- Composition ----------------------------------------------------------------------------------------


def kind_at(seed: int, split: str, index: int) -> str:
    """Name the look-alike at an index; every run of len(LOOKALIKES) indices holds each kind once."""
    kinds = list(LOOKALIKES)
    turn, place = divmod(index, len(kinds))
    random.Random(f"{seed}/{split}/kinds/{turn}").shuffle(kinds)
    return kinds[place]


def choose_poses(scene: Scene) -> list[Pose]:
    """Place one to three foods of one kind side by side, at any angle, at times cut off by the frame."""
    rng = scene.rng
    angle = rng.uniform(0, 2 * math.pi)
    cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
    # Half the length, and half the breadth over 0.55, of the largest food that fits in the frame.
    fit = min(scene.width / (cos + 0.55 * sin), scene.height / (sin + 0.55 * cos)) / 2
    count = rng.choice((1, 1, 1, 1, 2, 3))
    size = fit * rng.uniform(0.85, 1.35) * (1, 0.8, 0.65)[count - 1]
    x, y = scene.width * rng.uniform(0.42, 0.58), scene.height * rng.uniform(0.42, 0.58)
    middle = Pose(x, y, size, angle, tilt=rng.uniform(0.85, 1.0))
    bend = rng.uniform(-0.12, 0.12)
    offsets = [number - (count - 1) / 2 for number in range(count)]
    return [middle.at(0, offset, turn=rng.uniform(-0.12, 0.12), bend=bend) for offset in offsets]


def edge_pose(scene: Scene) -> Pose:
    """Give a pose near the frame for an object beside the food."""
    rng = scene.rng
    angle = rng.uniform(0, 2 * math.pi)
    x, y = scene.width * (0.5 + 0.5 * math.cos(angle)), scene.height * (0.5 + 0.5 * math.sin(angle))
    size = min(scene.width, scene.height) * rng.uniform(0.2, 0.34)
    return Pose(x, y, size, angle + math.pi / 2 + rng.uniform(-0.4, 0.4))


def draw_image(label: str, *, seed: int, split: str, index: int) -> Image.Image:
    """Draw one picture of a hot dog or of a look-alike; equal arguments give equal pictures."""
    if label not in LABELS:
        raise ValueError(f"label must be one of {', '.join(LABELS)}, not {label!r}")
    rng = random.Random(f"{seed}/{split}/{label}/{index}")
    scene = Scene(rng)
    food = hotdog if label == "hotdog" else LOOKALIKES[kind_at(seed, split, index)]
    rng.choice(BACKGROUNDS)(scene)
    poses = choose_poses(scene)
    for prop in rng.sample(PROPS, rng.choice((0, 1, 1, 2))):
        prop(scene, edge_pose(scene))
    support = rng.choice((plate, plate, tray, None))
    if support is not None:
        middle = poses[len(poses) // 2]
        size = middle.size * (1.05 + 0.35 * len(poses) * rng.random())
        support(scene, replace(middle, size=size, tilt=1, bend=0))
    for pose in poses:
        food(scene, pose)
    if rng.random() < 0.15:
        fingers(scene, poses[-1])
    elif rng.random() < 0.2:
        rng.choice((napkin, fork, bottle))(scene, edge_pose(scene))
    return scene.develop()


# --- The folder -----------------------------------------------------------------------------------------


def draw_sample(
    folder: str | os.PathLike, *, train: int = 200, test: int = 100, seed: int = 0, progress: bool = True
) -> Path:
    """Draw folder/{train,test}/{hotdog,not-hotdog}/NNNN.jpg, unless that very sample is there already."""
    folder = Path(folder)
    facts = {"generator_version": GENERATOR_VERSION, "train": train, "test": test, "seed": seed}
    images = {
        f"{split}/{label}/{index:04d}.jpg": (split, label, index)
        for split, count in (("train", train), ("test", test))
        for label in LABELS
        for index in range(count // 2)
    }
    if _read_marker(folder) == facts and _drawn_images(folder) == images.keys():
        return folder
    _refuse_foreign(folder)
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    # Drawn beside the folder and moved into place at the end, so that a crash leaves no half-drawn sample.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=parent) as temporary:
        fresh, old = Path(temporary, "fresh"), Path(temporary, "old")
        todo = tqdm(
            images.items(), desc="Drawing sample images", unit="image", disable=None if progress else True
        )
        for name, (split, label, index) in todo:
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_image(label, seed=seed, split=split, index=index).save(path, quality=JPEG_QUALITY)
        (fresh / MARKER).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.replace(old)
        fresh.replace(folder)
    return folder


def _read_marker(folder: Path) -> dict[str, int] | None:
    """Read what the marker says of the sample in a folder; None where there is no marker of ours."""
    try:
        facts = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) and "generator_version" in facts else None


def _drawn_images(folder: Path) -> set[str]:
    """List the images in a folder by their path inside it."""
    return {path.relative_to(folder).as_posix() for path in folder.glob("*/*/*.jpg")}


def _refuse_foreign(folder: Path) -> None:
    """Raise UserError where redrawing would delete something that this module has not drawn."""
    if not folder.exists():
        return
    contents = [path for path in folder.rglob("*") if not path.is_dir()]
    foreign = [path for path in contents if not OWN_FILES.fullmatch(path.relative_to(folder).as_posix())]
    if not folder.is_dir() or foreign or (contents and _read_marker(folder) is None):
        example = f" ({foreign[0].name}, for one)" if foreign else ""
        raise UserError(
            f"{folder} exists and holds something other than a drawn sample{example}; nothing was changed. "
            "Choose another folder for the sample, or move this one out of the way."
        )
