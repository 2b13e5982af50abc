"""One file per command: `run(settings)` reads the settings, calls the library, and returns the artefact's path."""
