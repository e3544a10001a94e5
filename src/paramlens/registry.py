"""Every analysis, in the order of `paramlens --help` and of the page. To add one, write its file and add a line here."""

from paramlens.analysis.analysis import Analysis
from paramlens.analysis.commands.agreement import AgreementAnalysis
from paramlens.analysis.commands.circuit import CircuitAnalysis
from paramlens.analysis.commands.inspect import InspectAnalysis
from paramlens.analysis.commands.suppress import SuppressAnalysis
from paramlens.analysis.commands.trace import TraceAnalysis
from paramlens.baselines.svd_command import SvdAnalysis

ANALYSES: tuple[Analysis, ...] = (
    CircuitAnalysis(),
    InspectAnalysis(),
    SuppressAnalysis(),
    TraceAnalysis(),
    SvdAnalysis(),
    AgreementAnalysis(),
)
