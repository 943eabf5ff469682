"""How commands ask for a device."""

DEVICE_HELP = "cpu, cuda (cuda:1 for the second GPU), tensorrt or rtx; the bundle's target unless given."
GRAPHS_HELP = "On a GPU: record the steps that come often, and replay them."
