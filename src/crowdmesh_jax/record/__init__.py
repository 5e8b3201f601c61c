"""What a run leaves behind: folder, journal, checkpoints, trace."""

from .checkpoint import Checkpoint, load_checkpoint, read_manifest, save_checkpoint
from .files import write_atomic
from .folder import RunFolder
from .journal import Journal, read_journal
from .trace import TraceEvent, chrome_trace, timeline_events

__all__ = [
    "Checkpoint",
    "Journal",
    "RunFolder",
    "TraceEvent",
    "chrome_trace",
    "load_checkpoint",
    "read_journal",
    "read_manifest",
    "save_checkpoint",
    "timeline_events",
    "write_atomic",
]
