"""hone: from a base language model to a trained, evaluated, served one."""
