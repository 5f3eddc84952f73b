"""The anatomy of nobody: tissue values of a head, a chest and an upper abdomen at points in millimetres.

Every individual trait is drawn from the random generator in a fixed order, so one seed is one person on
any grid. Left and right are painted alike on folded coordinates; the bending of space makes them differ.
"""

import numpy as np

from medgen.data.painting import (
    Field,
    Number,
    Points,
    band,
    ellipsoid,
    inside,
    intersection,
    length,
    mirrored,
    paint,
    thickness,
    tube,
    turned,
    union,
    waves,
)

# -- the head ----------------------------------------------------------------------------------------


def warped(world: Points, rng: np.random.Generator) -> Points:
    """Where each point of this person lies in the common anatomy, after a registration that is never perfect."""
    size = 1 + rng.normal(0, [0.012, 0.012, 0.012])
    centre = np.array([0.0, -18, 5])
    bends = [1.3 * waves(world, rng, 5, (130, 300)) for _ in range(3)]
    return (world - centre) / size + centre + np.stack(bends, -1)


def head_tissue(p: Points, rng: np.random.Generator, edge: Number) -> Field:
    """T1 intensities of scalp, skull, face and brain at anatomical positions `p` (mm)."""
    vault = ellipsoid(p, (0, -17, 12), (62, 85, 62))
    hull = union(union(union(_cerebrum(mirrored(p)), vault, 4), _cerebellum(mirrored(p)), 14), _stem(p), 14)
    cranium = hull - rng.uniform(1.5, 3.0)
    bone = cranium - rng.uniform(6.0, 8.5) - 1.2 * waves(p, rng, 5, (60, 120))
    thick = rng.uniform(2.5, 6.0)
    face = union(ellipsoid(p, (0, 22, -48), (61, 72, 60)), tube(p, [(0, -35, -55, 52), (0, -40, -160, 54)]), 30)
    scalp = union(bone - thick - 3, face, 15)
    image = np.zeros(p.shape[:-1])
    # Air needs no painting, and the brain only its own part of the head.
    head, skull = scalp < edge, cranium < edge
    muscle = 84 + 9 * waves(p[head], rng, 8, (14, 40))
    layers = [(scalp[head], 120), (scalp[head] + 2, 205), (scalp[head] + 2 + thick, muscle), *_face(p[head])]
    marrow = np.maximum(bone + 2.5, -(cranium - 2.0))
    layers += [(bone[head], 22), (marrow[head], 92), (cranium[head], 34)]
    clivus = ellipsoid(p[head], (0, 16, -38), (23, 30, 21))
    layers += [(clivus, 22), (clivus + 2.5, 100), (ellipsoid(p[head], (0, 24, -34), (11, 11, 8)), 5)]
    image[head] = _painted(image[head], layers, edge)
    image[skull] = _brain(image[skull], p[skull], rng, edge)
    return image


def _painted(image: Field, layers: list[tuple[Field, Number | Field]], edge: Number) -> Field:
    for distance, value in layers:
        paint(image, distance, value, edge)
    return image


def _face(p: Points) -> list[tuple[Field, Number]]:
    """Orbits, eyes, sinuses, airway and spine below the brain, left and right alike."""
    q = mirrored(p)
    air = [
        ((0, 62, -52), (9, 22, 19)),
        ((26, 54, -58), (12, 14, 14)),
        ((0, 14, -88), (11, 8, 34)),
    ]
    spine = tube(p, [(0, -38, -74, 15), (0, -42, -150, 15)])
    return [
        (ellipsoid(q, (31, 56, -30), (18, 22, 17)), 205),
        (tube(q, [(31, 45, -30, 4.5), (14, 20, -24, 3.5)]), 95),
        (ellipsoid(q, (31, 62, -30), (12.5, 12.5, 12.5)), 60),
        (ellipsoid(q, (31, 62, -30), (11, 11, 11)), 26),
        (ellipsoid(q, (31, 71, -30), (4.5, 2.5, 4.5)), 80),
        *[(ellipsoid(q, centre, radii), 4) for centre, radii in air],
        (ellipsoid(p, (0, 62, -52), (1.5, 22, 16)), 70),
        (spine, 30),
        (spine + 3, 115),
        (tube(p, [(0, -48, -74, 7), (0, -52, -150, 7)]), 34),
    ]


def _brain(image: Field, p: Points, rng: np.random.Generator, edge: Number) -> Field:
    """Paint cortex with its folds, white matter, cerebellum, stem, nuclei and ventricles."""
    atrophy = rng.uniform(0, 1)
    q = mirrored(p)
    depth = -_cerebrum(q)
    # Folds start from the medial wall too, but leave the block of nuclei and ventricles alone.
    core = ellipsoid(q, (0, -6, 7), (27, 50, 27))
    depth = np.maximum(np.minimum(depth, q[..., 0]), np.minimum(-core, depth))
    near = depth > -8
    pial = np.full(depth.shape, -8.0)
    pial[near] = _folded(depth[near], p[near], rng, 1.0 + 1.1 * atrophy)
    callosum = tube(q, [(0, 26, -2, 4), (0, 33, 8, 5), (0, 14, 25, 4), (0, -18, 28, 4), (0, -38, 17, 6)])
    fissure = intersection(q[..., 0] - rng.uniform(0.6, 1.4), -callosum - 3, 3)
    pial = np.minimum(pial, np.where(near, fissure, -8.0))
    ribbon = rng.uniform(2.5, 3.2)
    paint(image, -pial, 98 + 4 * waves(p, rng, 8, (15, 40)), edge)
    paint(image, ribbon - pial, 156 + 3 * waves(p, rng, 6, (30, 80)), edge)
    paint(image, intersection(callosum, -depth, 2), 158, edge)
    _hindbrain(image, p, rng, edge)
    for centre, radii, value in _NUCLEI:
        paint(image, ellipsoid(q, centre, radii), value, edge)
    paint(image, tube(q, [(24, -10, -18, 5), (28, -24, -14, 4.5), (26, -36, -4, 3.5)]), 108, edge)
    swell = rng.normal(0.0, 0.8) + 3.0 * atrophy - 0.6
    for path in _VENTRICLES:
        paint(image, tube(q, path) - swell * 0.7, 33, edge)
    return image


# Centre and half axes (mm) of the deep grey matter on one side, and its T1 intensity.
_NUCLEI = (
    ((14, 14, 9), (5.5, 10, 8), 112),
    ((27, 4, 2), (6, 17, 10), 114),
    ((20, -3, 0), (4.5, 9, 6.5), 128),
    ((11, -17, 8), (9, 14, 9), 121),
)
# Lateral ventricle with its horns, third and fourth ventricle: x, y, z, radius (mm) on one side.
_VENTRICLES = (
    ((7, 32, 6, 3.0), (9, 22, 12, 4.5), (11, 0, 21, 4.0), (16, -24, 21, 4.5), (25, -40, 10, 5.5), (24, -62, 6, 2.0)),
    ((25, -40, 8, 4.5), (33, -26, -10, 2.0), (31, -10, -18, 1.2)),
    ((0, 4, -6, 1.0), (0, -14, -1, 1.6), (0, -26, 2, 1.0)),
    ((0, -44, -26, 1.5), (0, -47, -34, 3.5), (0, -46, -44, 1.5)),
)


def _cerebrum(q: Points) -> Field:
    """Distance to the hull of one hemisphere, narrower in front, with its temporal lobe."""
    y = q[..., 1]
    slim = q * np.stack([1 + 0.0016 * np.maximum(y + 25, 0), np.ones_like(y), np.ones_like(y)], -1)
    upper = intersection(ellipsoid(slim, (11, -17, 12), (57, 85, 62)), -(q[..., 2] + 16), 12)
    temporal = ellipsoid(q, (43, -14, -20), (23, 44, 23))
    return union(upper, temporal, 3)


def _cerebellum(q: Points) -> Field:
    return union(ellipsoid(q, (24, -64, -32), (28, 27, 21)), ellipsoid(q, (0, -66, -29), (10, 22, 18)), 5)


def _stem(p: Points) -> Field:
    return tube(p, [(0, -16, -4, 11), (0, -25, -26, 14), (0, -35, -48, 9), (0, -42, -90, 6)])


def _folded(depth: Field, p: Points, rng: np.random.Generator, width: Number) -> Field:
    """Depth (mm) below the pial surface when sulci cut into a smooth hull.

    Sulci are the zero sheets of band-passed noise that varies along the surface much more than
    across it, which gives the winding, branching pattern of gyri; half of it is common to both sides.
    """
    middle = np.array([26.0, -17, 8])
    noise = np.zeros(depth.shape)
    for points, weight in ((mirrored(p), 0.8), (p + np.array([40.0, 0, 0]), 0.6)):
        away = points - middle
        radius = length(away)[..., None] + 20
        noise += weight * waves(55 * away / radius + 0.45 * away, rng, 16, (28, 46))
    # Unit-variance noise of wavelength w has an average slope of about 2 pi / w at its zeros.
    sheet = np.abs(noise) * 31 / (2 * np.pi)
    floor = 16 + 5 * waves(p, rng, 5, (40, 80))
    sulcus = np.hypot(sheet, np.maximum(depth - floor, 0)) - width * np.clip(1.6 - depth / 14, 0.25, 1.6)
    return np.minimum(depth, sulcus)


def _hindbrain(image: Field, p: Points, rng: np.random.Generator, edge: Number) -> None:
    q = mirrored(p)
    cerebellum = _cerebellum(q)
    leaves = np.abs(
        np.sin((q[..., 2] + 0.5 * np.abs(q[..., 1] + 50) + 3 * waves(p, rng, 4, (40, 60))) * 2 * np.pi / 18)
    )
    paint(image, cerebellum, 104, edge)
    paint(image, cerebellum + 4 + 7 * leaves, 142, edge)
    paint(image, _stem(p), 140, edge)
    paint(image, tube(q, [(6, -16, -6, 7), (16, -8, 2, 6)]), 150, edge)


# -- the chest ---------------------------------------------------------------------------------------


def chest_path(p: Points, rng: np.random.Generator, illness: np.random.Generator | None) -> Field:
    """Attenuation summed along the beam: body, minus air in the lungs, plus bones, heart and vessels."""
    wide, tall = rng.normal(1, 0.05), rng.normal(1, 0.05)
    p = (p - rng.normal(0, 5, 3) * [1, 1, 0]) / [wide, tall, 1]
    p = p + np.stack([4 * waves(p, rng, 4, (150, 300)) for _ in range(2)] + [np.zeros(p.shape[:-1])], -1)
    q = mirrored(p)
    trunk = union(ellipsoid(q, (40, 60, 0), (118, 230, 1e6)), ellipsoid(q, (95, -118, 0), (75, 50, 1e6)), 40)
    trunk = union(trunk, tube(q, [(0, -250, 0, 52), (0, -110, 0, 58)]), 30)
    path = 1.75 * thickness(trunk, 75)
    right, left = _lung(p, rng, -1), _lung(p, rng, 1)
    heart = _heart(p, rng)
    lungs = np.minimum(right, left)
    open_air = thickness(intersection(lungs, -heart, 4), 42)
    behind = thickness(lungs, 42) - open_air
    path -= 1.38 * open_air + 0.55 * behind
    path += 0.55 * thickness(heart, 60)
    path += _bones(p, q, lungs, rng)
    path += 0.30 * _vessels(p, rng, lungs, thickness(lungs, 25))
    path += 0.06 * waves(p, rng, 14, (6, 18)) * open_air
    stomach = ellipsoid(p, (70, rng.normal(118, 6), 0), (rng.uniform(18, 30), rng.uniform(10, 16), 1e6))
    path -= 0.5 * thickness(intersection(stomach, -lungs + 4, 3), 18)
    if illness is not None:
        path += _consolidation(p, illness, lungs)
    return path


def _lung(p: Points, rng: np.random.Generator, side: int) -> Field:
    """Distance to the lung on the picture's left (-1, the patient's right) or right (1)."""
    dome = rng.normal(96, 7) + (6 if side > 0 else -4)
    inner = 26 if side < 0 else 30
    q = p * [side, 1, 1]
    body = ellipsoid(q, (70, 20, 0), (60, 150, 1e6))
    apex = ellipsoid(q, (56, -80, 0), (42, 62, 1e6))
    shape = union(body, apex, 30)
    mediastinum = inner - q[..., 0] - 0.00055 * (q[..., 1] + 20) ** 2
    # The dome falls away to a sharp costophrenic angle outside, more gently towards the heart.
    outside = q[..., 0] - 62
    diaphragm = q[..., 1] - dome - np.where(outside > 0, 0.0100, 0.0035) * outside**2
    return intersection(intersection(shape, mediastinum, 10), diaphragm, 3)


def _heart(p: Points, rng: np.random.Generator) -> Field:
    """Distance to the heart and great vessels; its width varies as the cardiothoracic ratio does."""
    size = rng.normal(1, 0.07)
    ventricle = ellipsoid(turned(p, (28, 62), -35), (0, 0, 0), (58 * size, 40 * size, 1e6))
    atrium = ellipsoid(p, (-14, 58, 0), (30 * size, 40, 1e6))
    aorta = tube(p, [(14, -48, 0, rng.uniform(13, 19)), (6, 10, 0, 24)])
    cava = tube(p, [(-18, -95, 0, 10), (-16, 30, 0, 14)])
    return union(union(ventricle, atrium, 15), union(aorta, cava, 10), 12)


def _bones(p: Points, q: Points, lungs: Field, rng: np.random.Generator) -> Field:
    """Attenuation of spine, ribs, clavicles and shoulder blades."""
    x, y = q[..., 0], q[..., 1]
    path = 0.32 * thickness(x - 17, 12) * (0.85 + 0.15 * np.cos(2 * np.pi * p[..., 1] / 25))
    step, slope = rng.normal(25, 1.0), rng.normal(0.35, 0.05)
    cage = inside(union(lungs, lungs, 1) - 14, 8.0)
    for rib in range(10):
        top = -142 + step * rib
        reach = 1 + 0.05 * rib
        back = y - top - slope * (x - 20) - 0.0030 / reach * np.maximum(x - 55, 0) ** 2.1
        front = y - top - 66 + 0.42 * (x - 40) + 0.0016 * (x - 125) ** 2 * (x < 125)
        path += cage * (x > 15) * (0.16 * band(back, 6.5) + 0.10 * band(back, 6.5, rim=True))
        path += cage * (x > 48) * 0.10 * band(front, 6.5) * (rib < 7)
    clavicle = tube(q, [(14, -112, 0, 6.5), (50, -122, 0, 5), (95, -142, 0, 5), (125, -146, 0, 6)])
    path += 0.34 * thickness(clavicle, 5)
    blade = ellipsoid(turned(q, (128, -62), 14), (0, 0, 0), (26, 70, 1e6))
    return path + 0.12 * thickness(blade, 6)


def _vessels(p: Points, rng: np.random.Generator, lungs: Field, depth: Field) -> Field:
    """Pulmonary vessels: trees that branch from both hila and thin out."""
    total = np.zeros(lungs.shape)
    x, y = p[..., 0].copy(), p[..., 1].copy()
    for side in (-1, 1):
        stack = [(np.array([side * 34.0, 2.0 - 8 * (side > 0)]), angle, 8.0) for angle in np.linspace(-75, 80, 6)]
        while stack:
            start, angle, radius = stack.pop()
            angle = angle + rng.normal(0, 9)
            way = np.array([side * np.cos(np.radians(angle)), np.sin(np.radians(angle))])
            stop = start + way * rng.uniform(2.6, 3.6) * radius * 1.6
            (cx, cy), reach = (start + stop) / 2, np.linalg.norm(stop - start) / 2 + radius
            near = (np.abs(x - cx) < reach) & (np.abs(y - cy) < reach)
            vessel = tube(p[near], [(*start, 0.0, radius * 0.55), (*stop, 0.0, radius * 0.42)])
            total[near] = np.maximum(total[near], radius / 8 * thickness(vessel, radius * 0.5))
            if radius > 2.6:
                stack += [(stop, angle + turn, radius * 0.76) for turn in (-rng.uniform(8, 30), rng.uniform(8, 30))]
    hila = [ellipsoid(p, (side * 38, 2 - 8 * (side > 0), 0), (14, 22, 1e6)) for side in (-1, 1)]
    return total * np.minimum(1, depth * 1.5) + 0.8 * thickness(np.minimum(*hila), 14)


def _consolidation(p: Points, rng: np.random.Generator, lungs: Field) -> Field:
    """Attenuation of one to three patches of filled lung, ragged and soft at their edges."""
    deep = np.argwhere(lungs < -14)
    filled = np.zeros(lungs.shape)
    for _ in range(rng.integers(1, 4)):
        centre = p[tuple(deep[rng.integers(len(deep))])]
        away = (p - centre) / np.array([rng.uniform(0.8, 1.3), rng.uniform(0.7, 1.2), 1])
        ragged = length(away) - rng.uniform(20, 40) * (1 + 0.25 * waves(p, rng, 8, (20, 60)))
        filled = np.maximum(filled, 1 / (1 + np.exp(ragged / 5)))
    mottled = 0.85 + 0.15 * waves(p, rng, 10, (8, 20))
    return rng.uniform(0.55, 0.95) * filled * mottled * thickness(lungs, 22)


# -- the upper abdomen -------------------------------------------------------------------------------


def torso(p: Points, rng: np.random.Generator, edge: Number) -> Field:
    """HU of the upper abdomen at anatomical positions `p` (mm): x right to left is plus to minus, z up."""
    skin = union(ellipsoid(p, (0, 2, 0), (160, 104, 1e6)), ellipsoid(p, (0, -60, 0), (110, 46, 1e6)), 30)
    image = np.full(p.shape[:-1], -1000.0)
    body = skin < edge
    image[body] = _painted(image[body], _organs(p[body], skin[body], rng), edge)
    return image


def _organs(p: Points, skin: Field, rng: np.random.Generator) -> list[tuple[Field, Number | Field]]:
    """Everything inside the skin, in the order of painting."""
    fat, wall = rng.uniform(8, 20), 15.0
    dome = p[..., 2] - 62 + 0.004 * (p[..., 0] ** 2 + (p[..., 1] - 5) ** 2) - 3 * waves(p, rng, 4, (60, 120))
    inner = skin + fat + wall
    texture = 6 * waves(p, rng, 10, (12, 30))
    layers = [(skin, 20), (skin + 2.5, -105), (skin + fat, 52), (inner, -95), *_ribs(p, skin + fat + 6)]
    liver = intersection(ellipsoid(p, (62, 8, 8), (92, 82, 70)), np.maximum(inner + 4, dome), 6)
    spleen = intersection(ellipsoid(p, (-98, -38, 14), (30, 42, 46)), np.maximum(inner + 4, dome), 6)
    stomach = intersection(ellipsoid(p, (-58, 38, 8), (46, 34, 48)), np.maximum(inner + 6, dome), 6)
    layers += [(intersection(inner + 3, -dome, 3), -850), (liver, 62 + texture), (spleen, 75 + texture)]
    layers += [(stomach, 45), (stomach + 4, 15), (np.maximum(stomach + 5, 55 - p[..., 1]), -990)]
    for side in (-1, 1):
        kidney = ellipsoid(p, (side * 58, -38, -40 - 8 * side), (26, 24, 48))
        pelvis = ellipsoid(p, (side * 48, -34, -40 - 8 * side), (13, 11, 22))
        psoas = tube(p, [(side * 26, -38, -20, 9), (side * 38, -34, -110, 18)])
        erector = ellipsoid(p, (side * 32, -76, 0), (27, 18, 1e6))
        layers += [
            (kidney, 130),
            (kidney + 8, 95),
            (pelvis, -60),
            (pelvis + 5, 10),
            (psoas, 55),
            (erector, 55 + texture),
        ]
    layers += [*_bowel(p, rng), *_vertebrae(p), *_great_vessels(p, liver)]
    return layers


def _ribs(p: Points, around: Field) -> list[tuple[Field, Number]]:
    """Ribs: slanting rods where planes that fall forwards meet the chest wall."""
    level = p[..., 2] + 0.45 * p[..., 1] + 0.05 * np.abs(p[..., 0])
    rod = np.hypot(around + 1, (np.mod(level + 14, 28) - 14) * 0.9) - 5.0
    rod = np.maximum(rod, 40 - np.abs(p[..., 0]) - 0.6 * np.maximum(-p[..., 1] - 20, 0))
    return [(rod, 620), (rod + 3, 220)]


def _bowel(p: Points, rng: np.random.Generator) -> list[tuple[Field, Number]]:
    layers = []
    for _ in range(9):
        centre = rng.uniform([-75, 22, -90], [60, 62, -38])
        loop = tube(p, [(*centre, 13), (*(centre + rng.uniform(-30, 30, 3)), 12)])
        layers += [
            (loop, 50),
            (loop + 3, 12),
            (np.maximum(loop + 4, centre[1] + rng.uniform(-4, 14) - p[..., 1]), -960),
        ]
    return layers


def _vertebrae(p: Points) -> list[tuple[Field, Number]]:
    disc = np.abs(np.mod(p[..., 2], 34) - 17) - 13.0
    body = intersection(ellipsoid(p, (0, -44, 0), (23, 18, 1e6)), disc, 3)
    flat = p * [1, 1, 0]
    arch = tube(mirrored(flat), [(15, -58, 0, 6), (10, -74, 0, 5), (1, -98, 0, 5)])
    wing = intersection(tube(mirrored(flat), [(14, -66, 0, 5), (44, -76, 0, 4)]), disc + 5, 2)
    bone = intersection(np.minimum(arch, wing), disc - 2, 2)
    canal = ellipsoid(p, (0, -68, 0), (10, 8.5, 1e6))
    disc_space = ellipsoid(p, (0, -44, 0), (22, 17, 1e6))
    return [(disc_space, 85), (bone, 480), (body, 620), (body + 4, 210), (canal, 15), (canal + 4, 38)]


def _great_vessels(p: Points, liver: Field) -> list[tuple[Field, Number]]:
    aorta = tube(p, [(-10, -16, 150, 12), (-7, -17, 0, 11), (-2, -18, -150, 9)])
    cava = tube(p, [(24, -2, 80, 13), (18, -12, 0, 12), (16, -14, -150, 11)])
    portal = tube(p, [(14, 6, -24, 8), (46, 10, 4, 6), (80, 24, 14, 4)])
    veins = tube(p, [(24, -2, 48, 6), (64, 18, 34, 4), (98, 30, 24, 2.5)])
    branch = tube(p, [(46, 10, 4, 5), (90, -20, 10, 3)])
    hepatic = np.maximum(np.minimum(np.minimum(portal, veins), branch), liver + 2)
    return [(hepatic, 118), (cava, 110), (aorta, 300), (aorta + 1.5, 185)]


__all__ = ["chest_path", "head_tissue", "torso", "warped"]
