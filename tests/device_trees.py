"""File trees of machines, as far as `fmedge doctor` reads them.

Written after NVIDIA's release notes and what owners of the boards have published of these files (release lines, models,
compatible strings, power modes, places of TensorRT's bindings); none was recorded by us on a device.
"""

from __future__ import annotations

from pathlib import Path

LIBRARIES = "usr/lib/aarch64-linux-gnu"
INTEL = "usr/lib/x86_64-linux-gnu"
NANO_SUPER = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0"
NANO_SUPER_COMPATIBLE = "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0"
AGX_COMPATIBLE = "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0"
THOR_COMPATIBLE = "nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0"
NO_SWAP = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
ZRAM = NO_SWAP + "".join(f"/dev/zram{n}                              partition\t650244\t\t0\t\t5\n" for n in (0, 1))
NANO_MODES = """< POWER_MODEL ID=0 NAME=15W >
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
< POWER_MODEL ID=3 NAME=7W >
< PM_CONFIG DEFAULT=1 >
"""


def release(major: int, revision: str, gcid: int = 1, board: str = "generic") -> str:
    """The release line of Jetson Linux."""
    line = f"# R{major} (release), REVISION: {revision}, GCID: {gcid}, BOARD: {board}, EABI: aarch64, DATE: Mon Jun  1"
    return f"{line} 09:28:48 PM UTC 2026\n# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n"


def memory(total: int, available: int) -> str:
    """/proc/meminfo, of kilobytes."""
    return f"MemTotal:       {total:8} kB\nMemFree:        {available // 2:8} kB\nMemAvailable:   {available:8} kB\n"


def cuda(version: str) -> str:
    """version.json of a CUDA toolkit."""
    return f'{{"cuda": {{"name": "CUDA SDK", "version": "{version}"}}}}\n'


def tensorrt(library: str, python: str, bindings: str | None = None, folder: str = LIBRARIES) -> dict[str, str]:
    """What libnvinfer10 and python3-libnvinfer install: the bindings' modules have no tag of a Python."""
    packages = f"usr/lib/python{python}/dist-packages"
    return {
        f"{folder}/libnvinfer.so.{library.split('.', maxsplit=1)[0]}": "",
        f"{folder}/libnvinfer.so.{library}": "",
        f"{packages}/tensorrt-{bindings or library}.dist-info/METADATA": "Name: tensorrt\n",
        f"{packages}/tensorrt/tensorrt.so": "",
    }


ORIN_NANO_JETPACK_6_2 = {
    "etc/nv_tegra_release": release(36, "4.3", 38968081),
    "proc/device-tree/model": NANO_SUPER,
    "proc/device-tree/compatible": NANO_SUPER_COMPATIBLE,
    "proc/meminfo": memory(7802948, 5452000),
    "proc/swaps": ZRAM,
    "var/lib/nvpmodel/status": "pmode:0000\n",
    "etc/nvpmodel.conf": NANO_MODES,
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
    "usr/local/cuda/version.json": cuda("12.6.11"),
    f"{LIBRARIES}/libcudnn.so.9.3.0": "",
    f"{LIBRARIES}/nvidia/libnvdla_compiler.so": "",
    f"{LIBRARIES}/nvidia/libcuda.so.1.1": "",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\n",
    **tensorrt("10.3.0", "3.10"),
}
ORIN_NANO_JETPACK_6_0 = {
    **ORIN_NANO_JETPACK_6_2,
    "etc/nv_tegra_release": release(36, "3.0", 36106755),
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=7W >\n",
    "usr/local/cuda/version.json": cuda("12.2.140"),
    **tensorrt("8.6.2", "3.10"),
}
for name in ("libnvinfer.so.10", "libnvinfer.so.10.3.0"):
    del ORIN_NANO_JETPACK_6_0[f"{LIBRARIES}/{name}"]
ORIN_NX_JETPACK_6_1 = {
    **ORIN_NANO_JETPACK_6_2,
    "etc/nv_tegra_release": release(36, "4.0", 37537400),
    "proc/device-tree/model": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0000\0nvidia,p3767-0000\0nvidia,tegra234\0",
    "proc/meminfo": memory(16000000, 14000000),
}
ORIN_NANO_JETPACK_6_2_1 = {**ORIN_NANO_JETPACK_6_2, "etc/nv_tegra_release": release(36, "4.7", 42132812)}
ORIN_NANO_JETPACK_5_1 = {
    "etc/nv_tegra_release": release(35, "3.1", 32827747, "t186ref"),
    "proc/device-tree/model": "NVIDIA Orin Nano Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0003\0nvidia,tegra234\0nvidia,tegra23x\0",
    "proc/meminfo": memory(6481176, 4500000),
    "proc/swaps": ZRAM,
    **tensorrt("8.5.2", "3.8"),
}
XAVIER_JETPACK_5_1 = {
    **ORIN_NANO_JETPACK_5_1,
    "proc/device-tree/model": "NVIDIA Jetson Xavier NX Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3509-0000+p3668-0000\0nvidia,tegra194\0",
}
NANO_JETPACK_4 = {
    "etc/nv_tegra_release": "# R32 (release), REVISION: 7.1, GCID: 29818004, BOARD: t210ref, EABI: aarch64\n",
    "proc/device-tree/model": "NVIDIA Jetson Nano Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3449-0000-b00+p3448-0000-b00\0nvidia,jetson-nano\0nvidia,tegra210\0",
    "proc/meminfo": memory(4059268, 2600000),
    "usr/local/cuda/version.txt": "CUDA Version 10.2.300\n",
    **tensorrt("8.2.1", "3.6"),
}
THOR_JETPACK_7_0 = {
    "etc/nv_tegra_release": release(38, "2.0", 41844464),
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "proc/device-tree/compatible": THOR_COMPATIBLE,
    "proc/meminfo": memory(128826384, 120000000),
    "proc/swaps": NO_SWAP,
    "usr/local/cuda/version.json": cuda("13.0.1"),
    f"{LIBRARIES}/libcudnn.so.9.12.0": "",
    f"{LIBRARIES}/libcuda.so.580.00": "",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.00  Release Build\n",
    **tensorrt("10.13.3", "3.12", "10.13.3.9"),
}
THOR_JETPACK_7_1 = {**THOR_JETPACK_7_0, "etc/nv_tegra_release": release(38, "4.0")}
THOR_JETPACK_7_2 = {
    **{name: text for name, text in THOR_JETPACK_7_0.items() if "10.13" not in name},
    "etc/nv_tegra_release": release(39, "2.1"),
    "usr/local/cuda/version.json": cuda("13.2.1"),
    **tensorrt("10.16.2", "3.12", "10.16.2.10"),
}
ORIN_JETPACK_7_2 = {
    "etc/nv_tegra_release": release(39, "2.0", 45755727),
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "proc/device-tree/compatible": AGX_COMPATIBLE,
    "proc/meminfo": memory(64349224, 59000000),
    "proc/swaps": NO_SWAP + "/swapfile file 16777212 0 -2\n",
    "var/lib/nvpmodel/status": "pmode:0000\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=15W >\n",
    "usr/local/cuda/version.json": cuda("13.2.0"),
    f"{LIBRARIES}/libcudnn.so.9.20.0": "",
    **tensorrt("10.16.2", "3.12", "10.16.2.10"),
}
# The package of the bindings alone was updated, from CUDA's own repository.
ORIN_WITH_BINDINGS_OF_11 = {
    **{name: text for name, text in ORIN_JETPACK_7_2.items() if "dist-info" not in name},
    "usr/lib/python3.12/dist-packages/tensorrt-11.2.1.2.dist-info/METADATA": "Name: tensorrt\n",
}
# Docker hides the device tree; what the NVIDIA runtime brings in depends on it.
CONTAINER_ON_ORIN = {
    ".dockerenv": "",
    "sys/devices/soc0/family": "Tegra\n",
    "sys/devices/soc0/soc_id": "35\n",
    "sys/devices/soc0/machine": NANO_SUPER.rstrip("\0") + "\n",
    "proc/meminfo": memory(7802948, 5452000),
    "proc/swaps": ZRAM,
    "etc/nv_tegra_release": release(36, "4.3"),
    f"{LIBRARIES}/nvidia/libcuda.so.1.1": "",
    f"{LIBRARIES}/nvidia/libnvdla_compiler.so": "",
    **tensorrt("10.3.0", "3.10"),
}
CONTAINER_WITHOUT_RUNTIME = {
    name: text for name, text in CONTAINER_ON_ORIN.items() if "nvidia/" not in name and "etc/" not in name
}
DESKTOP = {
    "proc/meminfo": memory(65768000, 60000000),
    "proc/swaps": NO_SWAP,
    "usr/local/cuda/version.json": cuda("13.0.2"),
    f"{INTEL}/libnvinfer.so.10.16.1": "",
    f"{INTEL}/libcudnn.so.9.14.0": "",
}
DESKTOP_WITHOUT_TOOLKIT = {
    "proc/meminfo": memory(32768000, 30000000),
    "proc/swaps": NO_SWAP,
    f"{INTEL}/libcuda.so.1": "",
    f"{INTEL}/libcuda.so.580.95.05": "",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n",
}
DESKTOP_BEFORE_REBOOT = {
    **DESKTOP_WITHOUT_TOOLKIT,
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.135  Fri Jan 10 20:00:00 UTC\n",
}
DESKTOP_WITH_TWO_TOOLKITS = {
    **DESKTOP,
    "usr/local/cuda-12.6/version.json": cuda("12.6.85"),
    "usr/local/cuda-13.0/version.json": cuda("13.0.2"),
}
WSL_2 = {
    "proc/version": "Linux version 6.6.87.2-microsoft-standard-WSL2 (root@439a258ad544) (gcc 11.2.0) #1 SMP\n",
    "proc/meminfo": memory(16275000, 15000000),
    "proc/swaps": NO_SWAP + "/dev/sdb partition 4194304 0 -2\n",
    "usr/lib/wsl/lib/libcuda.so.1": "",
    "usr/lib/wsl/lib/libcuda.so.1.1": "",
}
GRACE_SERVER = {
    "proc/meminfo": memory(592000000, 580000000),
    "proc/swaps": NO_SWAP,
    "sys/devices/soc0/family": "jep106:036b\n",
    "sys/devices/soc0/soc_id": "jep106:036b:0241\n",
    f"{LIBRARIES}/libcuda.so.580.95.05": "",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.95.05  Release\n",
    **tensorrt("10.13.3", "3.12"),
}
RASPBERRY_PI = {
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712\0",
    "proc/meminfo": memory(8256448, 7000000),
    "proc/swaps": NO_SWAP + "/var/swap file 524272 0 -2\n",
}
# Neither macOS nor Windows has /proc or /etc/nv_tegra_release.
WITHOUT_PROC: dict[str, str] = {"Applications/Safari.app/Contents/Info.plist": "<plist/>\n"}


def write_tree(root: Path, files: dict[str, str]) -> Path:
    """Write the files of a machine under `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root
