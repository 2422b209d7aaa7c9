"""Plain prose that the damage of an edit is measured on: `PASSAGES`, and which of them a case reads, `passage_of`."""

from __future__ import annotations

from rome_lab.base import seed_from
from rome_lab.editing import TEXT

PASSAGES = (
    TEXT,
    "The letter arrived on a Thursday, when nobody expected it. My aunt put it on the table next to the fruit and went "
    "on peeling potatoes as if it were a bill. Only after supper, when the plates were dry and my cousins had gone out "
    "to look for the cat, did she open it with a kitchen knife. She read it twice, folded it along the old lines and "
    "said that the house by the lake was to be sold. Nobody answered. We had spent every summer there since I could "
    "walk, and each of us was thinking of a different room. Then my uncle asked whether there was any coffee left, and "
    "she got up to make some.",
    "To repair a bicycle tyre, first let out what air is left and lift one side of the tyre over the rim with two flat "
    "levers. Pull out the tube, pump it up a little and hold it close to your ear, or under water, until you find the "
    "hole. Dry the place, roughen it with sandpaper and spread a thin layer of glue. Wait until the glue no longer "
    "looks wet before you press the patch on; most repairs fail because somebody was in a hurry. Before the tube goes "
    "back, run your fingers along the inside of the tyre, for the thorn that made the hole is often still there. Pump "
    "slowly and check that it sits evenly.",
    "The committee met for the third time in the small hall behind the library. There were fewer people than before, "
    "and those who came kept their coats on because the heating had failed. The question was still the same: should the "
    "money be spent on a new roof for the swimming pool, or on the road to the upper part of the village, which had "
    "been closed twice after heavy rain? The treasurer read out figures that everybody had already seen in the "
    "newspaper. A young father said that he would rather have a road in winter than a pool in summer. In the end they "
    "voted to ask an engineer, and to meet again in a month.",
    "Soil is not simply dirt. A handful of it from a healthy garden holds grains of rock, water, air, the remains of "
    "plants, and more living things than anyone has counted. Most are too small to be seen. They break down what falls "
    "to the ground and turn it into food for roots, and roots in turn feed them with sugar. Where this exchange is "
    "disturbed, by digging too often or by leaving the ground bare, rain washes the finest parts away and the rest "
    "becomes hard. It may take a few years to ruin a field and a lifetime to restore it. Gardeners who cover the earth "
    "with leaves in autumn are helping more than they know.",
    "She had played the same piece at every concert for ten years, and that evening her hands forgot it. It was in the "
    "slow part, where nothing is difficult. For a moment there was only the noise of the ventilation and somebody's "
    "cough. She did not stop; she repeated the last four bars, softly, as though they had been written twice, and by "
    "the time they ended the rest had come back. Afterwards a student told her that he had never heard the passage "
    "played with so much doubt, and that it was beautiful. She thanked him and did not explain. On the train home she "
    "opened the score and looked at the page for a long time.",
    "Most people who begin to run give up within two months, usually because they start too fast. The body gets used to "
    "effort in its own time: the lungs after a few weeks, muscles after a few more, tendons and bones only after half a "
    "year. A sensible plan therefore looks almost too easy. Walk for two minutes, run for one, and repeat that eight "
    "times, three days a week. If you can talk while you run, the speed is right. Add a minute now and then, and take a "
    "whole week of rest when your knees complain. It is better to finish a month with the wish to do more than to spend "
    "the next one on a sofa with a bag of ice.",
    "The ferry left an hour late, with a broken radio and more goats than passengers. The captain, a cheerful woman "
    "with a cold, said that the wind would turn before noon and that until then we should sit on the left side. We did "
    "as we were told. A man in a suit tried to read and gave up; two girls counted jellyfish and quarrelled over the "
    "number. When the first island came into view it looked like a loaf of bread that somebody had dropped into the "
    "sea. There was no harbour, only a wall with iron rings, and a boy waiting with a wheelbarrow. He took the mail, "
    "one goat and the newspapers, and we went on.",
)


def passage_of(case_id: str | int) -> int:
    """Which of the passages a case reads: of many cases each is read by as many, and all methods of a case read the same."""
    return seed_from(str(case_id)) % len(PASSAGES)
