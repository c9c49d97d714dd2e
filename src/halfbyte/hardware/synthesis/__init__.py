"""From the units of `halfbyte.hardware.rtl` to gates: area, energy, and the proof of what the gates compute.

    flow      Amaranth to RTLIL to Yosys: the smallest of several mappings to a cell library
    liberty   cell libraries; our own is unit_gate.lib
    netlist   the gates, as a graph; evaluate runs them, 64 inputs to a machine word
    proofs    a netlist against exact arithmetic (subjects, floats)
    toggles   the energy of the gates at work (operands)
    table     all of it, and units.json, which the performance model reads

`./dev synth` is the command, `python -m halfbyte.hardware.synthesis` the same without the developer's environment.
It needs the optional packages of ``pip install 'halfbyte[hw]'``; importing this package does not.
"""
