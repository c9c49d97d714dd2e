"""From a model to cycles, bytes and picojoules, and from Python to a processing element that can be synthesized.

    from halfbyte.hardware.tracing import trace              # a model's training step: every GEMM, all other work
    from halfbyte.hardware.presets import PRESETS, isoarea   # machines, every number with its source
    from halfbyte.hardware.model import estimate             # cycles, what bounds them, bytes, energy
    from halfbyte.hardware.waterfall import waterfall        # what is left of "seven times", stage by stage
    from halfbyte.hardware.density import definitions, fig6c
    from halfbyte.hardware.rtl import UNITS                  # the units in Amaranth; needs halfbyte[hw]

Nothing is imported here: the model needs no torch, and only `rtl` and `synthesis` need Amaranth and Yosys.

Constants, equations and findings are from IBM's publications and from tables that their modules name. IBM holds a
patent on an array of such units, US 12,443,841 B2. This code is for study and simulation; that is no legal advice.
"""
