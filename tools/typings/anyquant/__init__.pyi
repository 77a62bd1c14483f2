# Read by no one: mypy takes anyquant from the repository root. The file makes this folder a package, so that
# mypy finds anyquant.exporters in it, which is a link to exporters/ (where an install puts it there for real).
