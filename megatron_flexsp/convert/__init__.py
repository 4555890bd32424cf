"""An existing Megatron launch script or configuration made its FlexSP version, every change explained."""
