"""What writes the files runs against the version that wrote them alone."""

collect_ignore = ["make.py", "make_training.py"]
