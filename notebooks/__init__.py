"""The tutorials, as files: ``importlib.resources.files("latentcot.notebooks")`` finds them in an installed package too."""
