"""Components that a user might add; the tests find them through `_target_` alone."""
