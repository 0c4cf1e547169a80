"""What reading a zip file that is broken, or made to break readers, may raise."""

import zipfile

BROKEN = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    EOFError,
    OSError,
    ValueError,
    NotImplementedError,  # a compression or version that zipfile does not know
    RuntimeError,  # a member that is encrypted
)
