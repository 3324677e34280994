"""The NFFA-EUROPE 100% SEM set (Aversa et al., Sci. Data 5:180172, 2018): its class names and counts."""

#: Class name -> number of images in the corrected record (21,169 in all), in the set's own order.
CLASS_COUNTS: dict[str, int] = {
    "Porous_Sponge": 174,
    "Patterned_surface": 4752,
    "Particles": 3905,
    "Films_Coated_Surface": 309,
    "Powder": 898,
    "Tips": 1621,
    "Nanowires": 3815,
    "Biological": 962,
    "MEMS_devices_and_electrodes": 4583,
    "Fibres": 150,
}

CLASS_NAMES: tuple[str, ...] = tuple(CLASS_COUNTS)
