import io

from rich.console import Console

from mechjax.base.progress import bar, track


def _console(is_terminal):
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=100)


def test_track__on_a_terminal__says_compiling_until_the_first_step_is_done():
    console = _console(True)
    with bar("Sweeping", 2, console=console) as progress:
        progress.advance()
        progress.advance()
    assert "compiling" in console.file.getvalue()
    assert "2/2" in console.file.getvalue()


def test_track__without_a_terminal__is_silent():
    console = _console(False)
    assert list(track(range(3), "Sweeping", console=console)) == [0, 1, 2]
    assert console.file.getvalue() == ""


def test_track__of_a_generator__needs_no_length():
    assert list(track((i for i in range(3)), "Sweeping", console=_console(True))) == [0, 1, 2]
