"""Plans as pictures: what a few decisions of an episode imagined, decoded, between the present and the goal."""

from __future__ import annotations

from data_pipelines.decoders import centre_crop
from worldmodel.planning.planned_episodes import PlannedEpisode
from worldmodel.report.decoded_pictures import BACKGROUND, GAP_PX, INK, LABEL_PX, font, tile
from worldmodel.report.drawing import Picture, data_uri, webp_that_fits

TILE_PX, STUB_PX = 64, 56  # side of a picture, width of the names of the rows
MAX_BYTES = 70_000


def plan_picture(episode: PlannedEpisode) -> Picture | None:
    """Draw a row for each decision: the frame that it saw, the decoded steps of its plan, and the goal image.

    None without decoded plans.
    """
    from PIL import Image, ImageDraw

    plans = episode.plans
    if plans is None:
        return None
    titles = ["seen", *(f"+{steps}" for steps in plans.ahead), "goal"]
    each = TILE_PX + GAP_PX
    size = STUB_PX + len(titles) * each, LABEL_PX + len(plans.at) * each
    whole = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(whole)
    for place, title in enumerate(titles):
        draw.text((STUB_PX + place * each, 1), title, INK, font())
    for row, (at, pictures) in enumerate(zip(plans.at, plans.pictures, strict=True)):
        top = LABEL_PX + row * each
        draw.text((2, top + TILE_PX // 2), f"step {at}", INK, font())
        for place, frame in enumerate([episode.frames[at], *pictures, episode.goal]):
            square = centre_crop(frame, min(frame.shape[1:]))
            whole.paste(tile(square, TILE_PX), (STUB_PX + place * each, top))
    uri = data_uri(webp_that_fits(whole, ({"lossless": True}, {"quality": 75}, {"quality": 30}), MAX_BYTES))
    decisions, last = ", ".join(str(at) for at in plans.at), plans.ahead[-1]
    words = (
        f"Episode {episode.number + 1}: the plans at steps {decisions} as decoded pictures, up to {last} steps ahead."
    )
    return Picture(uri, uri, words, *size)
