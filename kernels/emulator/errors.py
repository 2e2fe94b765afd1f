"""Errors of the emulator: one class for each kind of mistake in a kernel."""


class EmulatorError(RuntimeError):
    """A kernel or its launch is wrong, or the emulator cannot run it."""


class CompilerMissing(EmulatorError):
    """There is no clang, or it is too old."""


class LintError(EmulatorError):
    """The kernel's text is not valid Metal. The message has the compiler's diagnostics."""


class LaunchError(EmulatorError):
    """Metal does not allow this grid, threadgroup or argument."""


class OutOfBounds(EmulatorError):
    """A thread read or wrote outside its buffers."""


class Misaligned(EmulatorError):
    """A thread read or wrote at an address that is not a multiple of the type's alignment."""


class Divergence(EmulatorError):
    """Not all lanes of a simdgroup reached the same operation, or a lane does not exist."""


class BarrierError(EmulatorError):
    """Not all threads of a threadgroup reached the same barrier."""


class RaceError(EmulatorError):
    """The result depends on the order in which threads run."""


class ArithmeticFault(EmulatorError):
    """An integer division by zero, which Metal leaves undefined."""
