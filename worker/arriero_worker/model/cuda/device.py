"""This rank's GPU, and what is free on it. The only place that asks for a device's properties."""

from __future__ import annotations

import torch

from arriero_worker.model.backend import DeviceError


def open_device(index: int) -> torch.device:
    """Make the device of this number, among those that the process sees, the current one. Raises DeviceError."""
    if not torch.cuda.is_available():
        raise DeviceError(
            "the launch file asks for CUDA devices, and this machine shows none: it has no NVIDIA driver, no GPU is "
            "visible to this process, or PyTorch was built without CUDA"
        )
    count = torch.cuda.device_count()
    if index >= count:
        raise DeviceError(f"CUDA device {index} is needed, and this process sees {count}, counted from 0")
    torch.cuda.set_device(index)
    capability = torch.cuda.get_device_capability(index)
    if capability < (9, 0):
        name = torch.cuda.get_device_name(index)
        raise DeviceError(f"{name} has compute capability {capability[0]}.{capability[1]}: 9.0 or higher is needed")
    return torch.device("cuda", index)


def free_bytes(device: torch.device) -> int:
    """What can still be allocated: free on the device, and what PyTorch's allocator holds without use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def total_bytes(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[1])


def used_bytes(device: torch.device) -> int:
    """Of the whole device, by whomever."""
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)
