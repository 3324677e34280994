"""The ten specimen classes of SynthSEM, each a function of (specimen's random generator, view) -> Scene.

A scene draws all its random numbers before and apart from what the view shows, so that every view of a
specimen shows the same specimen.
"""

from collections.abc import Callable

import numpy as np

from emssl_hf.data.scenes.biology import biological
from emssl_hf.data.scenes.devices import mems, patterned
from emssl_hf.data.scenes.grains import particles, powder
from emssl_hf.data.scenes.stage import Scene, View
from emssl_hf.data.scenes.surfaces import films, porous
from emssl_hf.data.scenes.wires import fibres, nanowires, tips

#: Class name (NFFA's) -> scene.
SCENES: dict[str, Callable[[np.random.Generator, View], Scene]] = {
    "Porous_Sponge": porous,
    "Patterned_surface": patterned,
    "Particles": particles,
    "Films_Coated_Surface": films,
    "Powder": powder,
    "Tips": tips,
    "Nanowires": nanowires,
    "Biological": biological,
    "MEMS_devices_and_electrodes": mems,
    "Fibres": fibres,
}
