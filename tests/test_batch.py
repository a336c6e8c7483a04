"""Parameters that papermill would only warn about."""

import pytest

from capkit.batch import check_parameters

PARAMETERS = 'videos: str = "clips"  # which\nbatch_size: int = 1\nlimit: Optional[int] = None'


def test_known_parameters_pass():
    check_parameters(["", PARAMETERS, "import capkit"])
    check_parameters(["", PARAMETERS, '# Parameters\nbatch_size = 4\nvideos = "a # b"\n', "import capkit"])


def test_a_misspelt_one_is_named_with_the_one_that_was_meant():
    with pytest.raises(ValueError) as error:
        check_parameters(["", PARAMETERS, "# Parameters\nbatch_sise = 4\n", "import capkit"])
    assert "unknown parameter 'batch_sise'; did you mean 'batch_size'?" in str(error.value)
    assert "videos, batch_size, limit" in str(error.value)


def test_whatever_else_was_run_before_does_no_harm():
    check_parameters(["", "!ls", "%matplotlib inline", PARAMETERS, "import capkit"])
    with pytest.raises(ValueError, match="unknown parameter 'x'; This notebook has: videos"):
        check_parameters(["", "!ls", PARAMETERS, "# Parameters\nx = 1"])


def test_names_of_later_cells_are_not_parameters():
    check_parameters(["", PARAMETERS, "x = 1", "check_parameters(In)"])
