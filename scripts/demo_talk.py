"""Questions and answers of the demo grammar; ``demo_text`` explains their syntax.

In a frame, the user's and the assistant's turns alternate.
"""

WORDS: dict[str, str] = {
    "subject": """football, politics, algebra, computers, airplanes, dentists, money in banks,
        electricity, the news, modern art, trains, medicine, chemistry, dinosaurs, robots, cinema,
        volcanoes, grammar, taxes, jazz, photography, satellites, languages, philosophy""",
    "country": """France, Spain, Japan, Brazil, Kenya, Canada, India, Norway, Peru, Egypt, Poland,
        Mexico, Greece, Austria, Chile, Finland""",
    "machine": "telephone, computer, bicycle, radio, car, printer, camera, clock, washing machine",
    "prize": "football match, election, race, war, world cup, chess tournament, lottery",
}

_OLD = """
- (Hello|Hi|Good day|Good {time}|Hello there|Hi there)(.|!|)
- Hello! Ask me for a story, or ask me a question.
---
- How are you(| today| this {time})?
- I am {happy}, thank you! Shall I tell you a story?
---
- (Who|What) are you?
- I am a small model, and I tell stories.
---
- (Thank you|Thanks|Many thanks|Thank you very much)(.|!)
- You are welcome!
---
- (Goodbye|Good night|Bye)(.|!|)
- Goodbye! Come back soon.
---
- What is the (capital|population|history|largest city) of {country}?
| Who (won|lost|will win) the {prize} in {country}?
| Who (won|lost|will win) the {prize}?
| How (do I|can I) (repair|buy|use|build) a {machine}?
| What do you (know|think) about {subject}?
- I do not know that. I only know what I have read in my stories.
---
- (Explain|Tell me about) {subject}(.|, please.)
| Can you (explain|teach me|tell me about) {subject}?
| How does a {machine} work?
| (Why|When) was the {machine} invented?
- I do not know that. I only know what I have read in my stories.
---
- (Tell|Please tell) me a (short|) story about a {animal:animal}.
| (Tell|Write) a (short|little|) story about a {animal:animal}, please.
- There was once a {nature} {color} {animal} that lived (under|behind) the {thing} in the
  {place:place}. One {day} {time} it found a {toy} and shared some {food} with a {friend:animal}.
  After that it was never {sad} again.
---
- Where does the {animal:animal} (live|sleep)?
- The {animal} lives (under|behind) the {thing} in the {place}.
---
- What has {who:child} lost?
- {who} has lost a {color} {toy}, and {who.he} is {sad}.
---
- What did {who:child} plant in the {place:plot}?
- {who} planted a {flower} in the {place}, and {who.he} gave it water every {time}.
"""

_KITCHEN = """
- How (do|can) I (make|cook) a {veg:soupveg} soup?
| I (have|bought) some {veg:soupveg+}. How do I make a soup?
- Peel {few} {veg+}, chop them, and fry them in {fat}. Add {few} cups of (water|stock), and let the
  soup {cook} for {minutes} minutes. Serve it with {herb}.
---
- What do I need for a {fruit:fruit} {bake:bake}?
| (Give|Tell) me a recipe for a {fruit:fruit} {bake:bake}.
- You need {few} ripe {fruit+}, {few} cups of flour, and a {spoon} of {spice}. Bake the {bake} in a
  {heat} oven for {minutes} minutes.
---
- How (do|can|long must) I roast a {fish:fish}?
- Rub the {fish} with {fat} and {spice}, and roast it on a {heat} heat for {minutes} minutes. Serve
  it with {herb}.
"""

_SEA = """
- Where did the {rig:rig} {ship:ship} sail?
| (Tell|Please tell) me about the {rig:rig} {ship:ship}.
- The {ship} sailed from {port:port} to {goal:port} with a cargo of {cargo}. A {wind} breeze filled
  the {sail}, and she made {few} knots.
---
- Who was the captain of the {ship:ship}?
- Captain {captain} was her captain, and he feared only a {gale}.
---
- What happened to the {ship:ship} off the {coast:coast}?
- A {gale} struck, carried away the {sail}, and flooded the hold. The {crew} manned the pumps, and
  the {ship} limped into {goal:port}.
---
- What (did|does) the {ship:ship} carry?
- The {ship} carried {cargo:cargo} and {more:cargo} across the {sea}.
"""

_SKY = """
- (How|Where) do I find {star:star}?
- Look for {star.figure} above the {horizon} horizon. {star} is the {glow} star in {star.figure}.
---
- What is {star:star}?
| What do you know about {star:star}?
- {star} is a {glow} giant in {star.figure}, {few} hundred times (hotter|larger|brighter) than our
  sun.
---
- What does {planet:planet} look like?
| Which satellite does {planet:planet} have?
- Through a {scope}, {planet} is a {glow} disk with its satellite {planet.moon}.
---
- What is a {body:body}?
- A {body} is a {glow} thing in the sky. A {scholar} can see it with a {scope} for {few} {span}.
"""

_MARKET = """
- What do {deal:deal} {trade:trade.kind+} cost at {deal.each} pence each?
| One {trade:trade.kind} costs {deal:deal.each} pence. What do {deal} {trade.kind+} cost?
- At {deal.each} pence each, {deal} {trade.kind+} cost {deal.sum} pence.
---
- What does the {trade:trade} sell?
| Who sells {trade:trade.kind+}?
- The {trade} sells {trade.kind+} at a {stall} in the market square.
---
- (Where|When) is the market in {town:town}?
- The market in {town} is every {weekday} in the market square.
---
- Who bought the {lot:trade.kind} at the auction?
- A {buyer} bought the {lot.kind} for {bid.most} {coin+}.
"""

TALK: dict[str, str] = {
    "old": _OLD,
    "kitchen": _KITCHEN,
    "sea": _SEA,
    "sky": _SKY,
    "market": _MARKET,
}
SYSTEM = """
- Answer (in one sentence|briefly|kindly|in plain words).
| You are a (kind|helpful|friendly) (storyteller|assistant).
"""
