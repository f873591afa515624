"""Bindings of libspectralkv."""



__version__: str

def built_with_cuda() -> bool:
    """
    True when the CUDA backend was compiled in, whether or not there is a device for it.
    """

def cuda_device_count() -> int:
    """
    CUDA devices that can be used now; 0 without backend, driver or device.
    """

def cuda_status() -> str:
    """Why ``cuda_device_count()`` is 0; empty when it is not."""
