"""How results look: self-contained HTML pages, inline views for notebooks, text tables for the terminal."""

from mechjax.viz.arcs import Arc as Arc
from mechjax.viz.arcs import arcs as arcs
from mechjax.viz.attention import attention as attention
from mechjax.viz.attention import shown as shown
from mechjax.viz.attention import tokens_line as tokens_line
from mechjax.viz.bars import BarRow as BarRow
from mechjax.viz.bars import bars as bars
from mechjax.viz.circuit import circuit as circuit
from mechjax.viz.dashboard import dashboard as dashboard
from mechjax.viz.edge_graph import Drawn as Drawn
from mechjax.viz.edge_graph import edge_graph as edge_graph
from mechjax.viz.feature_card import feature_card as feature_card
from mechjax.viz.heatmap import heatmap as heatmap
from mechjax.viz.heatmap import legend as legend
from mechjax.viz.html import Html as Html
from mechjax.viz.html import escape as escape
from mechjax.viz.html import tag as tag
from mechjax.viz.node_map import node_map as node_map
from mechjax.viz.page import Page as Page
from mechjax.viz.page import check_writable as check_writable
from mechjax.viz.page import section as section
from mechjax.viz.scores import scores_page as scores_page
from mechjax.viz.scores import scores_text as scores_text
from mechjax.viz.text import heat_table as heat_table
