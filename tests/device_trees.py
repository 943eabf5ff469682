"""File trees of machines, as far as `fmedge doctor` reads them.

Written after NVIDIA's release notes and what the boards are known to have; none was recorded by us on a device.
"""

from __future__ import annotations

from pathlib import Path

LIBRARIES = "usr/lib/aarch64-linux-gnu"
ORIN_NANO_JETPACK_6_2 = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, "
    "DATE: Wed Jan  8 01:49:37 UTC 2025\n# KERNEL_VARIANT: oot\n",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
    "proc/meminfo": "MemTotal:        7802948 kB\nMemFree:         3400000 kB\nMemAvailable:    5452000 kB\n",
    "proc/swaps": "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    "/dev/zram0                              partition\t650244\t\t0\t\t5\n"
    "/dev/zram1                              partition\t650244\t\t0\t\t5\n",
    "var/lib/nvpmodel/status": "pmode:0002\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=25W >\n"
    "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
    "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}\n',
    f"{LIBRARIES}/libnvinfer.so.10": "",
    f"{LIBRARIES}/libnvinfer.so.10.3.0": "",
    f"{LIBRARIES}/libcudnn.so.9.3.0": "",
    f"{LIBRARIES}/nvidia/libnvdla_compiler.so": "",
    "usr/lib/python3.10/dist-packages/tensorrt-10.3.0.dist-info/METADATA": "Name: tensorrt\n",
}
THOR_JETPACK_7_0 = {
    "etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64\n",
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0",
    "proc/meminfo": "MemTotal:       128826384 kB\nMemAvailable:   120000000 kB\n",
    "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n",
    "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "13.0.1"}}\n',
    f"{LIBRARIES}/libnvinfer.so.10.13.3": "",
    f"{LIBRARIES}/libcudnn.so.9.12.0": "",
    f"{LIBRARIES}/nvidia/libnvdla_compiler.so": "",
    "usr/lib/python3/dist-packages/tensorrt-10.13.3.9.dist-info/METADATA": "Name: tensorrt\n",
    "usr/lib/python3/dist-packages/tensorrt/tensorrt.cpython-312-aarch64-linux-gnu.so": "",
}
ORIN_JETPACK_7_2 = {
    "etc/nv_tegra_release": "# R39 (release), REVISION: 2.0, GCID: 44000000, BOARD: generic, EABI: aarch64\n",
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0",
    "proc/meminfo": "MemTotal:       64349224 kB\nMemAvailable:   59000000 kB\n",
    "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n/swapfile file 16777212 0 -2\n",
    "var/lib/nvpmodel/status": "pmode:0000\n",
    "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "13.2.0"}}\n',
    f"{LIBRARIES}/libnvinfer.so.10.16.2": "",
    f"{LIBRARIES}/libcudnn.so.9.20.0": "",
    "usr/lib/python3/dist-packages/tensorrt-10.16.2.10.dist-info/METADATA": "Name: tensorrt\n",
    "usr/lib/python3/dist-packages/tensorrt/tensorrt.cpython-312-aarch64-linux-gnu.so": "",
}
DESKTOP = {
    "proc/meminfo": "MemTotal:       65768000 kB\nMemAvailable:   60000000 kB\n",
    "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n",
    "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "13.0.2"}}\n',
    "usr/lib/x86_64-linux-gnu/libnvinfer.so.10.16.1": "",
    "usr/lib/x86_64-linux-gnu/libcudnn.so.9.14.0": "",
}


def write_tree(root: Path, files: dict[str, str]) -> Path:
    """Write the files of a machine under `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root
