"""Run the `worldmodel` command: `python -m worldmodel`, `accelerate launch -m worldmodel train ...`."""

from worldmodel.commands.main import run_command

if __name__ == "__main__":
    run_command()
