import pytest

pytest.register_assert_rewrite("tests.checkpoint.helpers", "tests.checkpoint.resnet_states")
