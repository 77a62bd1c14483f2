"""Exporters: from the intermediate representation to files of other runtimes. Installed as anyquant.exporters."""
