"""Words and sentences of the demo grammar; ``demo_text`` explains their syntax."""


def _people(names: str, forms: str) -> str:
    return ", ".join(f"{name}/{forms}" for name in names.split())


_BOYS = _people("Tom Ben Sam Jack Will Hugo Oscar Leo Peter Henry Arthur Felix", "he/him/his")
_GIRLS = _people("Anna Mary Lucy Rose Clara Nell Emma Ruth Alice Molly Grace Ivy", "she/her/her")

WORDS: dict[str, str] = {
    # old: a village, its children and their animals
    "child": f"{_BOYS}, {_GIRLS}",
    "elder": "grandmother/she, grandfather/he, uncle/he, aunt/she, godmother/she",
    "day": "sunny, rainy, windy, warm, cold, misty, bright, gray, quiet",
    "time": "morning, afternoon, evening, day",
    "place": "garden, orchard, meadow, barn, yard, wood, field, stable, mill, pond",
    "plot": "garden, orchard, meadow, yard, field, park",
    "thing": """bench, hedge, gate, old tree, stone wall, cart, bucket, ladder, wooden box, hay,
        rose bush, broken fence, pile of leaves, well, little bridge""",
    "animal": """dog, cat, rabbit, pony, hen, duck, goat, lamb, kitten, puppy, mouse, goose, robin,
        hedgehog, squirrel, owl, donkey, frog""",
    "toy": "ball, kite, drum, doll, whistle, red scarf, wooden horse, blue cap, top, bell, button",
    "color": "red, blue, green, yellow, white, black, brown, gray, golden",
    "size": "small, little, big, tiny, tall, round, young, old",
    "food": "bread, cake, cheese, toast, gingerbread, apple pie, plum cake, cold ham",
    "happy": "happy, glad, proud, cheerful, merry, pleased, content",
    "sad": "sad, lonely, worried, sorry, cross, afraid, tired, unhappy",
    "nature": "brave, shy, clever, lazy, gentle, curious, hungry, noisy, polite, stubborn",
    "softly": "softly, slowly, gently, quietly, carefully, bravely, gladly, kindly",
    "sound": "a bell, a whistle, a song, a knock at the door, the wind, a splash, a sneeze",
    "build": "a tree house, a bird table, a swing, a snowman, a little hut, a stone tower, a raft",
    "part": "string, nails, wood, stones, branches, cloth, paint, rope, straw, feathers, mud",
    "flower": "daisy, tulip, poppy, rose, violet, sunflower, lily",
    "season": "spring, summer, autumn, winter",
    "game": "hide and seek, catch, marbles, hopscotch, chess, school, kings and queens",
    # kitchen
    "soupveg": """onion, carrot, leek, potato, turnip, parsnip, mushroom, tomato, beetroot, shallot,
        radish, pumpkin""",
    "cook": "simmer, boil, stew, bubble",
    "herb": "thyme, parsley, rosemary, sage, dill, basil, chives, mint, tarragon, marjoram",
    "spice": "cinnamon, nutmeg, ginger, cloves, pepper, saffron, cardamom, paprika, vanilla",
    "fruit": "plum, pear, cherry, apricot, quince, blackberry, gooseberry, fig, raspberry, peach",
    "fat": "butter, lard, olive oil, goose fat",
    "pan": "saucepan, copper pot, iron pot, skillet, stewpot, cauldron",
    "dish": "deep dish, baking tin, casserole, roasting pan, clay dish",
    "fish": "trout, herring, cod, mackerel, salmon, haddock",
    "minutes": "five, ten, fifteen, twenty, thirty, forty",
    "few": "two, three, four, five, six",
    "spoon": "teaspoon, tablespoon, spoonful, pinch",
    "heat": "low, gentle, moderate, high, steady",
    "bake": "pie, tart, loaf, pudding, crumble, sponge, bun, dumpling",
    # sea
    "ship": """Heron, Swallow, Marigold, Good Intent, Albatross, Northern Star, Endeavor, Petrel,
        Fair Isabel, Mermaid, Wanderer, Silver Thistle""",
    "rig": "brig, schooner, frigate, sloop, whaler, clipper, ketch",
    "port": """Lisbon, Bristol, Cadiz, Bergen, Valparaiso, Zanzibar, Halifax, Batavia, Nantucket,
        Port Royal, Trieste, Antwerp""",
    "cargo": """salt, timber, copper, tobacco, wool, tea, indigo, sugar, ivory, whale oil, silk,
        coffee""",
    "captain": "Hargrave, Delacroix, Mendoza, Thorne, Okafor, Lindqvist, Blackwood, Vane, Osei",
    "crew": "bosun, helmsman, first mate, gunner, carpenter, cabin boy, surgeon, lookout, purser",
    "ordinal": "second, third, fourth, fifth, sixth, seventh, ninth, tenth",
    "wind": "northerly, southerly, westerly, easterly",
    "gale": "gale, squall, tempest, hurricane, monsoon",
    "sail": "mainsail, foresail, topsail, jib, mizzen, spanker",
    "coast": "reef, cape, lagoon, archipelago, strait, shoal, estuary, peninsula",
    "beast": "dolphin, whale, shark, gannet, porpoise, turtle, octopus",
    "sea": "Atlantic, Pacific, Baltic, Caribbean, Adriatic, Indian Ocean, North Sea",
    # sky
    "planet": """Saturn/Titan, Saturn/Rhea, Saturn/Iapetus, Jupiter/Europa, Jupiter/Io,
        Jupiter/Ganymede, Jupiter/Callisto, Neptune/Triton, Uranus/Oberon, Uranus/Titania,
        Mars/Phobos, Mars/Deimos""",
    "neighbor": "Mercury, Venus, Mars, Jupiter, Saturn, Uranus, Neptune",
    "star": """Sirius/Canis Major, Vega/Lyra, Rigel/Orion, Betelgeuse/Orion, Deneb/Cygnus,
        Altair/Aquila, Arcturus/Bootes, Polaris/Ursa Minor, Capella/Auriga, Antares/Scorpius,
        Aldebaran/Taurus, Regulus/Leo, Spica/Virgo""",
    "figure": "Orion, Lyra, Cygnus, Cassiopeia, Perseus, Draco, Pegasus, Leo, Aquila, Andromeda",
    "body": "comet, asteroid, nebula, galaxy, meteor, star cluster, supernova",
    "scope": "telescope, refractor, reflector, spectroscope, field glass",
    "scholar": "astronomer, professor, observer, student, mathematician",
    "glow": "faint, brilliant, crimson, silvery, pale, steady, flickering, bluish, hazy",
    "measure": "orbit, brightness, distance, spectrum, diameter, rotation, parallax, eclipse",
    "feature": "clouds, poles, storms, shadows, craters, stripes",
    "cluster": "star cluster, nebula, galaxy",
    "span": "days, weeks, months, years, decades, centuries",
    "ages": "years, decades, centuries, lifetimes",
    "horizon": "eastern, western, southern, northern",
    # market
    "trade": """baker/loaf, weaver/shawl, potter/jug, tinker/kettle, farmer/cabbage,
        fishwife/eel, cobbler/slipper, candlemaker/candle, hatter/bonnet, beekeeper/honeypot,
        basketmaker/basket, cheesemonger/cheese""",
    "title": "Mrs. Hale, Mr. Finch, old Barnaby, Widow Pell, Mr. Osgood, Dame Tilly, Miss Quill",
    "weekday": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday",
    "deal": """two/two/four, two/three/six, two/four/eight, two/five/ten, two/six/twelve,
        three/two/six, three/three/nine, three/four/twelve, three/five/fifteen, four/two/eight,
        four/three/twelve, four/four/sixteen, five/two/ten, five/three/fifteen, five/four/twenty,
        six/two/twelve, six/three/eighteen""",
    "bid": """two/three/five, two/four/six, three/four/six, three/five/seven, four/six/nine,
        four/five/seven, five/seven/eight, five/eight/ten, six/seven/nine, six/nine/twelve""",
    "coin": "penny, shilling, farthing, groat, crown",
    "stall": "stall, booth, counter, trestle, barrow",
    "quality": "fine, cheap, sturdy, handsome, honest, crooked, splendid, ordinary, genuine",
    "buyer": "customer, merchant, peddler, housewife, sergeant, magistrate, schoolmaster, traveler",
    "town": "Wexcombe, Little Marlow, Oakhampton, Dunmere, Thornbury, Saltley",
}

_OLD = """
- (On a|One) {day} {time} {who:child} (went|walked|ran) to the {place:place} to look for a
  {color:color} {toy:toy}.
| It was a {day} {time}, and {who:child} had lost a {color:color} {toy:toy} (in|near) the
  {place:place}.
| {who:child} had a {color:color} {toy:toy} and (took it|carried it) to the {place:place} every
  {time}.
- {who.he} looked (under|behind) the {thing} and (under|behind) the {thing}, but the {toy} was not
  there.
| There was nothing behind the {thing} and nothing under the {thing}, and {who} felt {sad}.
| The {toy} had rolled (under|behind) the {thing}, and {who.he} could not find it.
- Then a {nature:nature} {animal:animal} came out from behind the {thing} and looked at {who.him}
  {softly}.
| {who} heard {sound} and saw a {nature:nature} {animal:animal} (near|beside) the {thing}.
- "(Have you seen|Did you find) my {toy}?" (asked|said) {who} {softly}, and the {animal}
  (nodded|jumped up).
| The {animal} (ran|went) round the {thing} and came back with the {color} {toy}.
? "Thank you, (little|dear|good) {animal}," said {who}, and gave it a piece of {food}.
| {who} laughed and gave the {animal} some {food} (from {who.his} pocket|from the kitchen table).
- They went home together (before dark|in the rain|before supper), and {who} was {happy} (again|all
  the way).
| From that day on, {who} and the {nature} {animal} were good friends and played {game} together.
---
- {who:child} went to see {who.his} {kin:elder} on a {day} {time} in {season}.
| On a {day} day in {season}, {who:child} took a basket to {who.his} {kin:elder}, who lived near the
  {place}.
- In the basket there was some {food:food}, a {color} {flower}, and a {toy}.
| {who.he} carried some {food:food} and a bunch of {color} {flower+} in the basket.
? On the way {who.he} met a {size} {animal:animal} that was very {nature}.
| A {size} {animal:animal} followed {who.him} past the {thing} and over the {thing}.
- "(Good {time}|Come in), {who}," said {who.his} {kin}, "what a {happy} face you have!"
| {who.his} {kin} was sitting by the (fire|window|door) and felt {happy} when {kin.he} heard
  {sound}.
| When {who.his} {kin} opened the door, {who} (said|sang out), "I have brought you some
  {food:food}!"
- They ate the {food:food} together and talked about the {animal:animal} in the {place}.
| After that they sat near the {thing} and {kin.he} told {who.him} a story about a {nature}
  {animal}.
- {who} (walked|ran) home in the {day} {time}, (tired|hungry|sleepy) but {happy}.
| When the sun went down, {who.he} said good night to {who.his} {kin} and to the {animal:animal} as
  well.
---
- The {size} {color:color} {animal:animal} lived (under|behind) the {thing} in the {place:place}.
| There was once a {nature} {color:color} {animal:animal} who lived in the {place:place} near a
  {thing}.
- (Every|Each) {time} the {animal} sat on the {thing} and listened to {sound}.
| It had a friend, a {size} {friend:animal}, and they played {game} near the {thing}.
- One {day} day a {nature} {guest:animal} came to the {place} and asked for some {food:food}.
| One {day} {time} the {animal} found a {toy} and some {food:food} under the {thing}.
- "You may (stay|sleep) here with me," said the {color} {animal} {softly}, "for I am {sad} without
  friends."
| The {animal} was {sad} at first, but then it (laughed|smiled) and shared the {food} {softly}.
? They made a (warm|soft) bed of (hay|leaves) behind the {thing} and slept until the {day} {time}.
| When it began to (rain|snow), they hid under the {thing} and sang {softly}.
- After that the {color} {animal} was never {sad}, not even on a {day} day in {season}.
| And if you go to the {place} on a {day} {time}, you can still hear {sound} there.
---
- {who:child} and {pal:child} wanted to (make|build) {build:build} in the {place:place}.
| "Let us (make|build) {build:build}," said {who:child} to {pal:child} on a {day} {time}.
- They (took|found) some {part} and some {part} behind the {thing} and started to work.
| {who} brought {part} and {part}, and {pal} brought some {food}.
? {pal} wanted to paint it {color}, but {who} liked {color} much more.
| A {nature} {animal} watched them from the {thing} all {time}.
- It fell down (once|twice|three times), but {who} and {pal} were {nature} and began again.
| "It is too {size}," said {pal} {softly}, so they (looked for|asked for) more {part}.
- (At last|In the end) {build} was ready, and all the children of the village came to see it.
| When it was done, {who} and {pal} sat beside it, ate some {food}, and felt {happy}.
? That night they could hear {sound} in the {place}, and {who} dreamed of a {color} {animal}.
| The next day a {size} {animal} moved in, and nobody was {sad} about it.
---
- In {season} {who:child} planted a {flower:flower} beside the {thing} in the {place:plot}.
| {who:child} wanted to grow a {color:color} {flower:flower} in the {place:plot}, so {who.he} dug a
  {size} hole.
- {who.he} gave it water every {time} and (talked|sang) to it {softly}.
| For {few} days nothing came up, and {who} was {sad}.
? A {nature} {animal:animal} wanted to eat it, but {who.he} gave the {animal} some {food} instead.
| "Please grow," said {who} {softly} on a {day} {time}, "and I will sing you a {nature} song."
- Then, on a {day} {time}, there was a {size} green leaf under the {thing}.
| After a {day} night the {flower} stood there, {color:color} and (sweet|tall|fresh|bright), and
  {who.he} felt {happy}.
- {who} ran to tell {pal:child}, and they looked at the {flower} {softly} for a long time.
| All the {flower+} in the {place} were {color:color}, but this one was the most beautiful, said
  {pal:child}.
- By the end of the {season} there were {few} {flower+}, and {who} gave one to {kid:child}.
| "It was worth the work," said {who}, and {pal:child} was {happy} too.
"""

_KITCHEN = """
- To make a (good|simple|hearty) {veg:soupveg} soup, peel {few} {veg+} and chop them
  (finely|roughly|into cubes).
| For {veg:soupveg} and {second:soupveg} soup, you (need|will need) {few} {veg+}, some {fat:fat},
  and fresh {herb:herb}.
- Melt a {spoon} of {fat:fat} in a {pan:pan} over a {heat} heat, then (add|stir in) the {veg+}.
| Warm the {fat:fat} in a {pan:pan}, sprinkle in some {spice}, and fry the {veg+} for {minutes}
  minutes.
? Season with {spice}, a {spoon} of salt, and {few} sprigs of {herb}.
| Add the diced {second:soupveg+}, cover the {pan:pan}, and let them soften for {minutes} minutes.
- Pour in {few} cups of (broth|stock|water) and let it {cook} over a {heat} heat for {minutes}
  minutes.
| Cover with (broth|stock), bring it to the boil, and let it {cook} until the {veg+} are tender.
? Taste the soup, and if it is too (thin|sharp|bland), whisk in a {spoon} of {fat:fat} or {spice}.
| Mash the {veg+} with a wooden spoon until the soup is (smooth|thick|velvety), and add {herb}.
- Serve the soup (hot|piping hot|steaming) in warm bowls, sprinkled with chopped {herb} and {spice}.
| Ladle it into {few} bowls and garnish each with {herb} and a swirl of {fat:fat}.
---
- A {fruit:fruit} {bake:bake} needs {few} ripe {fruit+}, {few} cups of flour, and a {spoon} of
  {spice:spice}.
| For a {fruit:fruit} {bake:bake}, sift {few} cups of flour with a {spoon} of sugar and some
  {spice:spice}.
- Rub the {fat} into the flour, knead the dough for {minutes} minutes, and (chill it|let it rest).
| Beat {few} eggs with the sugar until the mixture is (pale|frothy|creamy), then fold in the flour.
- Roll out the dough, line a greased {dish:dish}, and arrange the sliced {fruit+} on it with
  {spice}.
| Stone and slice the {fruit+}, toss them with sugar and {spice}, and spoon them into a {dish:dish}.
? Brush the top with beaten egg and dust it with sugar, {spice}, and grated lemon peel.
| Dot the {fruit+} with {fat} and a {spoon} of honey before the {dish:dish} goes into the oven.
- Bake the {bake} in a {heat} oven for {minutes} minutes, until the crust is (golden|crisp|brown).
| Put the {dish:dish} into a {heat} oven, bake it for {minutes} minutes, and test it with a skewer.
- Let the {bake} cool for {minutes} minutes and serve it with whipped cream and {spice}.
| Slice the {bake} while it is (warm|hot) and serve each slice with a {spoon} of {fruit} syrup.
---
- Clean {few} {fish:fish} fillets, rub them with {fat:fat} and {spice}, and lay them in a
  {dish:dish}.
| To roast {fish:fish} with {herb:herb}, grease a {dish:dish} and heat the oven to a {heat} heat.
- Stuff the {fish} with {herb}, sliced {soupveg+}, and a {spoon} of {spice}.
| Squeeze a lemon over the {fish} and scatter {herb} and chopped {soupveg+} around it.
- Roast it for {minutes} minutes and baste it with {fat} and its own juices (twice|often|now and
  then).
| Fry the {fish} on a {heat} heat for {minutes} minutes, turning it (once|twice), until the skin is
  crisp.
? Meanwhile, {cook} the {soupveg+} in salted water for {minutes} minutes and drain them well.
| For the sauce, whisk {few} egg yolks with a {spoon} of {fat} and some chopped {herb}.
- Serve the {fish} on a bed of {soupveg+} with a wedge of lemon and a sprig of {herb}.
| Garnish with {herb}, grind some {spice} over the {dish:dish}, and serve it at once.
"""

_SEA = """
- The {rig:rig} {ship:ship} sailed from {port:port} under Captain {captain:captain} with a cargo of
  {cargo:cargo}.
| Captain {captain:captain} of the {rig:rig} {ship:ship} weighed anchor at {port:port}, bound for
  {goal:port} with {cargo:cargo}.
| In the harbor of {port:port} the {rig:rig} {ship:ship} took on {cargo:cargo} and {more:cargo} for
  the voyage to {goal:port}.
- A fresh {wind:wind} breeze filled the {sail}, and by noon she was making {few} knots.
| The {crew} hoisted the {sail}, and a {wind:wind} breeze carried her out into the {sea:sea}.
? On the {ordinal} day the {crew} sighted a {beast} off the (port|starboard) bow.
| For {few} days a {beast} followed in her wake, and the {crew} called it a good omen.
- Off the {coast:coast} a {gale:gale} struck, carried away the {sail:sail}, and flooded the hold.
| Then the barometer fell, and a {wind} {gale:gale} drove the {rig} toward the {coast:coast}.
- "All hands aloft!" shouted the {crew}, and they reefed the {sail} (before midnight|in the spray).
| The {crew} lashed the {crew} to the mast while the sailors manned the pumps.
? They jettisoned {few} casks of {cargo}, and the {rig} rode the swell more easily.
| Captain {captain} marked the {coast} on the chart and steered {few} leagues to leeward.
- After {few} weeks at sea the {ship} dropped anchor at {goal:port}, her {cargo} dry and her crew
  alive.
| The {ship} limped into {goal:port} with a broken {sail}, and the {crew} kissed the quay.
---
- From the log of the {rig:rig} {ship:ship}: wind {wind:wind}, sea moderate, {few} leagues since
  dawn.
| The log of the {ship:ship} records a {wind:wind} wind and {few} fathoms of water off the
  {coast:coast}.
- At the change of the watch the {crew:crew} reported a {beast:beast} to starboard.
| The {crew:crew} sounded {few} fathoms and found sand, coral, and the bones of a {beast:beast}.
- An island lay beyond the {coast}, and Captain {captain:captain} ordered the longboat lowered.
| Captain {captain:captain} trained his spyglass on the {coast} and saw a {pirate:rig} flying no
  flag.
? The {crew} rowed ashore for fresh water and returned with {few} barrels and a {beast}.
| The sailors mended the {sail}, tarred the rigging, and sang of {port}.
- The {crew} swore that a mermaid had climbed the anchor chain and asked for {cargo}.
| On the beach they found a chest of {cargo} and a bottle with a letter from {port}.
- At dusk she stood out to sea again, bound for {goal:port} with the {wind} wind astern.
| The captain entered the island in the log as {ship} Rock and set a course for {goal:port}.
---
- The old {crew:crew} of the {rig:rig} {ship:ship} had crossed the {sea:sea} {few} times and feared
  only a {gale:gale}.
| No sailor knew the {sea:sea} better than the {crew:crew} of the {rig:rig} {ship:ship}.
- He could smell a {gale:gale} {few} leagues away and steer past a {coast:coast} without a chart.
| He had been shipwrecked off {port:port}, marooned on a {coast}, and bitten by a {beast:beast}.
? In the galley he traded {cargo} for rum and told the {mate:crew} about the {beast} of {port}.
| He wore an anchor on his arm and kept a carved {beast} in his sea chest.
- When the {gale} came, he stood at the helm for {few} watches and never let go of the wheel.
| One night off the {coast} he saw a lantern, and the {rig} turned (windward|leeward) just in time.
- Captain {captain:captain} gave him {few} casks of {cargo} when they landed at {goal:port}.
| "The tide waits for nobody," he told the {mate:crew}, and sailed for {goal:port} with the ebb.
"""

_SKY = """
- The {scholar:scholar} pointed the {scope:scope} at {planet:planet}, low above the {horizon}
  horizon.
| On a moonless night the {scholar:scholar} turned the {scope:scope} toward {planet:planet} in
  {figure:figure}.
- Through the lens {planet} appeared as a {glow} disk, with {few} satellites in a line.
| A {glow} band crossed the disk, and beside it the satellite {planet.moon} cast a {glow} shadow.
? The {scholar:scholar} sketched its {feature} and noted the {measure} of {planet.moon} in a
  notebook.
| {few} nights later {planet.moon} had vanished behind the planet, exactly as the tables predicted.
- Its {measure} (seemed|proved) greater than expected, which puzzled every {scholar:scholar} at the
  observatory.
| From its {measure} and its {measure} the {scholar:scholar} computed the mass of {planet}.
? Sunlight takes {few} hours to reach it, and a probe would need {few} {span}.
| Beneath the ice of {planet.moon} there may be an ocean, warmed by the gravity of {planet}.
- By dawn {planet} had set, and only {star} remained, {glow} above the {horizon} horizon.
| The measurement agreed with Kepler, and the {scholar:scholar} covered the {scope:scope} and slept.
---
- In the constellation {star:star.figure} a {glow:glow} {body:body} was discovered by a
  {scholar:scholar}.
| A {glow:glow} {body:body} appeared near {star:star} in {star.figure}, brighter than any in {few}
  {span}.
- It moves through space along an elliptical orbit, once in {few} {span}.
| Its {measure} changed over {few} {span}, while the light of {star:star} stayed constant.
? The {scholar:scholar} compared the {scope:scope} plates and found a {glow} tail of gas and dust.
| A {scope:scope} revealed hydrogen, helium, and traces of iron in its spectrum.
- Some called it a {body}, but its {measure} showed that it was a {second:body}.
| The {scholar:scholar} calculated its distance to be {few} thousand light years, far beyond {star}.
? Such a {body} forms when gravity gathers hydrogen for {few} million years.
| It will pass between {neighbor} and {neighbor} before it returns to the dark.
- Tonight it can be seen with a small {scope:scope}, a little (north|south|east|west) of {star}.
| In {few} {span} it will fade, and {star.figure} will look as it did to Ptolemy.
---
- To find {star:star}, first look for {star.figure} above the {horizon} horizon.
| {star:star} is the {glow} star in {star.figure}, visible for {few} months of the year.
- It is a {glow} giant, {few} hundred times (hotter|larger|brighter) than our sun.
| Its {glow} light left it {few} {ages} ago, and its {measure} is known to every {scholar:scholar}.
? Navigators measured its altitude with a (sextant|quadrant|astrolabe) to determine their latitude.
| The Greeks saw in {star.figure} a hero, and the Arabs gave {star} its name.
- Between {star} and {other:star} lies a {cluster} that a {scope:scope} can resolve into {few}
  thousand stars.
| With a {scope:scope} you can see that {star} is double, and its companion is {glow}.
- When {star} collapses, a {glow} supernova will outshine {neighbor} for {few} {span}.
| As the Earth rotates, {star.figure} circles the pole, and {star} sets in the {horizon} sky.
"""

_MARKET = """
- Every {weekday:weekday} {seller:title} the {trade:trade} sets up a {stall:stall} in the market
  square of {town:town}.
| At the {weekday:weekday} market in {town:town}, {seller:title} the {trade:trade} had a
  {stall:stall} full of {trade.kind+}.
- A {buyer:buyer} stopped at the {stall} and asked the price of {deal:deal} {quality} {trade.kind+}.
| "How much for {deal:deal} {trade.kind+}?" asked a {buyer:buyer}, who had a {quality} purse.
- "{deal.each} pence apiece, so {deal.sum} pence for all," answered {seller}.
| "At {deal.each} pence each, {deal} {trade.kind+} cost {deal.sum} pence," replied the {trade}.
? "That is robbery!" cried the {buyer}, and offered a {coin} and a {quality} {coin}.
| The {buyer} haggled until the bell of {town} struck noon, but the {trade} would not lower the
  price.
- The {buyer} counted {deal.sum} pence onto the {stall} and took the {deal} {trade.kind+}.
| In the end they agreed, and {deal.sum} pence changed hands for {deal} {quality} {trade.kind+}.
? "A {quality} bargain," muttered {seller}, and put the {coin} in the cash box.
| A {rival:trade} at the next {stall} sold {rival.kind+} at half the price and grumbled about taxes.
- By evening the {stall} was empty, and {seller} had earned a {coin} more than last {weekday}.
| When the market closed, {seller} the {trade} packed the unsold {trade.kind+} and paid the rent.
---
- The {trade:trade} and the {rival:trade} of {town:town} have quarreled since last
  {weekday:weekday}.
| In {town:town} the {trade:trade} pays the toll with {trade.kind+}, and the {rival:trade} with
  {rival.kind+}.
- One {quality} {trade.kind} is worth {few} {rival.kind+}, said {seller:title}, and the {rival}
  disagreed.
| {seller:title} offered {deal:deal} {trade.kind+} for a {coin}, which the {rival} thought too dear.
? A {buyer:buyer} weighed the {rival.kind+} on a {quality} scale and found them {few} ounces short.
| The {buyer:buyer} lent the {rival} a {coin} at interest, to be repaid on {weekday}.
- So {seller} bartered {few} {trade.kind+} for a {quality} {third:trade}'s license and a {coin}.
| The {rival} sold {few} dozen {rival.kind+} to a {buyer} and invested the profit in {trade.kind+}.
? "Credit is for gentlemen," said the {rival}, and chalked the debt on the {stall}.
| The clerk wrote the bargain in a ledger and charged each of them a {coin}.
- On {weekday} they settled the account: {few} {coin+} for the {trade}, and a {coin} for the clerk.
| Since then the {trade} and the {rival} share a {stall}, and the profit is {quality}.
---
- At the auction in {town:town} a {quality} {lot:trade.kind} was put up, and {seller:title} bid
  {bid:bid} {coin:coin+}.
| The auctioneer of {town:town} held up a {quality} {lot:trade.kind} and asked {bid:bid}
  {coin:coin+} for it.
- A {buyer:buyer} raised the bid to {bid.more} {coin+}, and the crowd (murmured|whistled|applauded).
| "{bid.more} {coin+}!" called a {buyer:buyer}, and {seller:title} (sighed|frowned|nodded).
? "It is a {quality} {lot.kind}," said the {rival:trade}, "and worth every {coin}."
? The {rival:trade} swore that the {lot.kind} was stolen from a {victim:buyer} in {origin:town}.
- The hammer fell, and the {lot.kind} went to the {buyer} for {bid.most} {coin+} and a
  {rival:trade.kind}.
| Nobody bid more than {bid.most} {coin+}, and the {buyer} paid the auctioneer on the spot.
- Next {weekday} the same {lot.kind} was for sale at a {stall} in {origin:town} for {bid.most}
  {coin+}.
| The {buyer} polished the {quality} {lot.kind} and resold it on {weekday} at a profit of {few}
  {coin+}.
"""

FRAMES: dict[str, str] = {
    "old": _OLD,
    "kitchen": _KITCHEN,
    "sea": _SEA,
    "sky": _SKY,
    "market": _MARKET,
}
