"""What the emulator raises: one class a kind of mistake that a kernel can make."""


class EmulatorError(RuntimeError):
    """A kernel, or the way it was launched, is wrong; or the emulator cannot run it."""


class CompilerMissing(EmulatorError):
    """No clang was found that is new enough."""


class LintError(EmulatorError):
    """The kernel's text is not valid Metal. The message has the compiler's diagnostics."""


class LaunchError(EmulatorError):
    """Grid, threadgroup or arguments are not what Metal accepts."""


class OutOfBounds(EmulatorError):
    """A thread read or wrote outside its buffers."""


class Misaligned(EmulatorError):
    """A thread read or wrote at an address that its type's alignment does not divide."""


class Divergence(EmulatorError):
    """Lanes of a simdgroup did not all arrive at the same operation, or one is missing."""


class BarrierError(EmulatorError):
    """Threads of a threadgroup did not all arrive at the same barrier."""


class RaceError(EmulatorError):
    """The result depends on the order in which threads run."""


class ArithmeticFault(EmulatorError):
    """An integer division by zero, which Metal leaves undefined."""
