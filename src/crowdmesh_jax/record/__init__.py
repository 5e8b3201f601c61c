"""What a run leaves behind: folder, journal, checkpoints, trace."""

from .checkpoint import Checkpoint, load_checkpoint, read_manifest, save_checkpoint
from .files import write_atomic
from .folder import RunFolder
from .journal import Journal, journal_writer, read_journal, read_sound_records
from .prediction import RunPrediction
from .recovery import RecoveryEvent, TakeOver
from .trace import RECOVERY_ROW, TraceEvent, chrome_trace, timeline_events, trace_events

__all__ = [
    "RECOVERY_ROW",
    "Checkpoint",
    "Journal",
    "RecoveryEvent",
    "RunFolder",
    "RunPrediction",
    "TakeOver",
    "TraceEvent",
    "chrome_trace",
    "journal_writer",
    "load_checkpoint",
    "read_journal",
    "read_manifest",
    "read_sound_records",
    "save_checkpoint",
    "timeline_events",
    "trace_events",
    "write_atomic",
]
