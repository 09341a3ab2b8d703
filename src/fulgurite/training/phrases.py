"""What people write in prompts besides the words that captions have."""

# Which of WordNet's senses the small model's things are: the first of "fox", and all kinds of it, is the fox. Of some
# things there are several, of a few none.
SENSES: dict[str, tuple[str, ...]] = {
    "Christmas tree": ("christmas tree 5",), "T-Rex": ("dinosaur 1",), "airplane": ("airplane 1",),
    "alien": ("alien 3",), "anchor": ("anchor 1",), "automobile": ("car 1",), "avocado": ("avocado 1",),
    "baby chick": ("chick 1",), "balloon": ("balloon 2",), "banana": ("banana 2",), "basketball": ("basketball 2",),
    "bat": ("bat 1",), "bear": ("bear 1",), "beer mug": ("beer 1", "beer mug 1"), "bicycle": ("bicycle 1",),
    "birthday cake": ("cake 3",), "bread": ("bread 1",), "broccoli": ("broccoli 2",), "bus": ("bus 1",),
    "butterfly": ("butterfly 1", "moth 1"), "cactus": ("cactus 1",), "carrot": ("carrot 1",),
    "castle": ("castle 2", "castle 1"), "cat face": ("cat 1",), "cheese wedge": ("cheese 1",),
    "cherries": ("cherry 3",), "cloud": ("cloud 2",), "cookie": ("cookie 1",), "cow face": ("cattle 1",),
    "crab": ("crab 1",), "crescent moon": ("moon 1",), "croissant": ("croissant 1",), "crown": ("crown 4",),
    "cupcake": ("cupcake 1", "muffin 1"),
    "deciduous tree": ("oak 2", "maple 2", "birch 3", "elm 1", "beech 1", "ash 2", "willow 1", "linden 1"),
    "dog face": ("dog 1",), "dolphin": ("dolphin 2", "porpoise 1"), "doughnut": ("doughnut 2",),
    "droplet": ("droplet 1", "raindrop 1"), "duck": ("duck 1",), "eagle": ("eagle 1",), "ear of corn": ("corn 3",),
    "egg": ("egg 2",), "eggplant": ("eggplant 1",), "elephant": ("elephant 1", "mammoth 1"),
    "evergreen tree": ("conifer 1",), "fire": ("fire 3", "campfire 1"), "fire engine": ("fire engine 1",),
    "flamingo": ("flamingo 1",), "flying saucer": ("flying saucer 1",), "four leaf clover": ("clover 1",),
    "fox": ("fox 1",), "french fries": ("french fries 1",), "frog": ("frog 1",), "game die": ("die 1",),
    "gem stone": ("gem 1", "jewel 2"), "ghost": ("ghost 3", "ghost 1"), "giraffe": ("giraffe 1",),
    "grapes": ("grape 1",), "guitar": ("guitar 1",), "hamburger": ("hamburger 1",), "hedgehog": ("hedgehog 2",),
    "helicopter": ("helicopter 1",), "high voltage": ("lightning 1",), "honeybee": ("bee 1",),
    "horse face": ("horse 1",), "hot beverage": ("coffee 1", "tea 1", "cocoa 1"),
    "hot dog": ("hot dog 2", "frankfurter 1"), "hot pepper": ("hot pepper 2",), "house": ("house 1",),
    "jack-o-lantern": ("pumpkin 2",), "key": ("key 1",), "kiwi fruit": ("kiwi fruit 1",), "koala": ("koala 1",),
    "lady beetle": ("lady beetle 1",), "laptop": ("laptop 1",), "lemon": ("lemon 1", "lime 3"),
    "light bulb": ("light bulb 1",), "lion": ("lion 1",), "locomotive": ("locomotive 1", "train 1"),
    "lollipop": ("lollipop 2",), "monkey face": ("monkey 1", "ape 1"), "motorcycle": ("motorcycle 1",),
    "mouse face": ("mouse 1", "rat 1"), "mushroom": ("mushroom 3", "toadstool 1"), "octopus": ("octopus 2",),
    "owl": ("owl 1",), "palm tree": ("palm 3",), "panda": ("panda 1",), "parrot": ("parrot 1",),
    "peach": ("peach 3",), "pear": ("pear 1",), "penguin": ("penguin 1",), "pig face": ("pig 1", "swine 1"),
    "pineapple": ("pineapple 2",), "pizza": ("pizza 1",), "rabbit face": ("rabbit 1", "hare 1"),
    "rainbow": ("rainbow 1",), "red apple": ("apple 1",), "ringed planet": ("planet 1",), "robot": ("robot 1",),
    "rocket": ("rocket 1", "spacecraft 1"), "rooster": ("rooster 1",), "rose": ("rose 1",),
    "running shoe": ("gym shoe 1", "running shoe 1"), "sailboat": ("sailboat 1", "sailing vessel 1"),
    "shark": ("shark 1",), "snail": ("snail 1",), "snake": ("snake 1",), "snow-capped mountain": ("mountain 1",),
    "snowflake": ("snowflake 1",), "snowman": ("snowman 1",), "soccer ball": ("soccer ball 1",),
    "soft ice cream": ("ice cream 1",), "spider": ("spider 1",), "spouting whale": ("whale 2",),
    "star": ("star 3", "star 5"), "strawberry": ("strawberry 1",), "sun": ("sun 1",), "sunflower": ("sunflower 1",),
    "swan": ("swan 1",), "t-shirt": ("t-shirt 1",), "tangerine": ("mandarin 5", "orange 1"), "teapot": ("teapot 1",),
    "teddy bear": ("teddy bear 1",), "television": ("television 3",), "tiger face": ("tiger 2",),
    "tomato": ("tomato 1",), "tractor": ("tractor 1",), "trophy": ("trophy 2",), "tropical fish": ("fish 1",),
    "trumpet": ("trumpet 1",), "tulip": ("tulip 1",), "turtle": ("turtle 2",), "umbrella": ("umbrella 1",),
    "unicorn": ("unicorn 1",), "volcano": ("volcano 2",), "watermelon": ("watermelon 2",),
    "wine glass": ("wineglass 1", "goblet 1"), "wolf": ("wolf 1",), "zebra": ("zebra 1",),
}  # fmt: skip

# Names of things that WordNet does not have, or has for other things as well.
MORE_NAMES: dict[str, tuple[str, ...]] = {
   
    "dog face": (
        "pup", "canine", "labrador", "golden retriever", "german shepherd", "chihuahua", "bulldog", "husky",
        "dalmatian", "dachshund", "shiba inu",
    ),
    "cat face": ("feline", "lynx", "tabby cat", "black cat", "pussycat", "wildcat"),
    "rabbit face": ("bunny rabbit", "easter bunny"), "mouse face": ("rodent", "hamster", "field mouse"),
    "cow face": ("calf", "bull", "ox", "dairy cow"), "pig face": ("hog", "boar", "piggy"),
    "horse face": ("foal", "colt"), "monkey face": ("chimpanzee", "gorilla", "orangutan", "baboon"),
    "bear": ("polar bear", "bear cub", "grizzly bear"), "frog": ("toad", "tree frog", "bullfrog"),
    "duck": ("drake", "rubber duck", "mallard"), "rooster": ("cockerel",),
    "baby chick": ("chickling", "hatchling"), "eagle": ("bald eagle", "hawk", "falcon"),
    "spouting whale": ("humpback whale", "sperm whale"),
    "tropical fish": ("goldfish", "angelfish", "carp", "koi", "salmon", "trout"), "octopus": ("squid", "kraken"),
    "butterfly": ("monarch butterfly", "moth"), "honeybee": ("wasp", "hornet"), "snake": ("viper", "cobra", "python"),
    "T-Rex": ("tyrannosaurus rex", "velociraptor", "dino"),
    "rocket": ("rocketship", "space shuttle", "missile", "spacecraft rocket"),
    "flying saucer": ("alien spaceship", "alien ship"),
    "automobile": ("sedan", "limousine", "convertible", "hatchback", "taxi", "suv"),
    "locomotive": ("tram", "railway engine"), "motorcycle": ("motor bike",), "bus": ("minibus", "double decker bus"),
    "airplane": ("airliner", "jumbo jet", "jet plane", "biplane"), "helicopter": ("chopper",),
    "sailboat": ("sail boat", "sailing ship"), "tractor": ("farm tractor",),
    "house": ("cabin", "hut", "villa", "mansion", "bungalow", "farmhouse"), "castle": ("citadel", "stronghold"),
    "evergreen tree": ("spruce", "fir", "cedar"), "deciduous tree": ("oak", "maple tree", "birch"),
    "rose": ("rosebud",), "mushroom": ("fly agaric",), "red apple": ("green apple",),
    "hot beverage": ("espresso", "cappuccino", "latte"), "beer mug": ("lager", "pint of beer"),
    "wine glass": ("champagne glass", "chalice"), "birthday cake": ("cheesecake", "wedding cake"),
    "soft ice cream": ("gelato", "sundae"), "hamburger": ("beefburger",),
    "bread": ("baguette", "bun"),
    "fire": ("bonfire", "flames", "blaze"), "snow-capped mountain": ("peak", "summit"),
    "droplet": ("raindrop", "teardrop"), "high voltage": ("bolt of lightning",),
    "gem stone": ("ruby", "emerald", "sapphire", "crystal"),
    "running shoe": ("running shoes", "sneakers", "trainers"), "television": ("television set", "telly"),
    "light bulb": ("lightbulb", "lamp"), "robot": ("droid", "cyborg"), "ghost": ("phantom", "spectre"),
    "alien": ("martian",), "crown": ("tiara", "coronet"),
    "wrapped gift": ("christmas present", "parcel", "birthday present"), "umbrella": ("parasol",),
    "trophy": ("medal", "award"), "trumpet": ("bugle", "cornet"), "soccer ball": ("soccerball",),
    "snowman": ("snow man",), "jack-o-lantern": ("halloween pumpkin face",),
    "watermelon": ("melon", "slice of watermelon"), "tangerine": ("clementine", "satsuma"), "lemon": ("lime",),
    "hot pepper": ("chili", "jalapeno", "paprika"), "cherries": ("cherry",),
    "grapes": ("bunch of grapes",), "strawberry": ("strawberries",), "star": ("five pointed star",),
    "sun": ("sunshine",), "key": ("keys",),
}  # fmt: skip

# What WordNet has for such a thing, and people do not.
NO_NAMES = (
    "mademoiselle", "molly", "mollie", "liza", "jonathan", "sam", "ling", "ben", "baba", "bleu", "pacer", "commuter",
    "streamliner", "interceptor", "kamikaze", "abyssinian", "alhambra", "vatican", "charger", "auto", "agua", "ridley",
    "cooter", "pinche", "ern", "brill", "gar", "rudd", "whiting", "starlet", "globe", "beef", "mouser", "mako",
)  # fmt: skip

# Of colours and styles.
SHADES = {
    "red": ("crimson", "scarlet", "ruby red", "cherry red"),
    "orange": ("amber", "tangerine colored", "bright orange"),
    "yellow": ("lemon yellow", "golden yellow", "bright yellow"),
    "green": ("emerald green", "lime green", "dark green", "olive"), "teal": ("turquoise", "cyan", "aqua"),
    "blue": ("azure", "navy blue", "sky blue", "cobalt", "dark blue", "light blue"),
    "purple": ("violet", "lilac", "lavender", "magenta"),
    "pink": ("rose pink", "salmon pink", "hot pink", "light pink"), "brown": ("chocolate brown", "tan", "beige"),
    "black": ("jet black", "pitch black", "dark"), "grey": ("gray", "silver grey", "light gray"),
    "white": ("plain white", "snow white", "pure white"),
}  # fmt: skip
MORE_STYLES: dict[str, tuple[str, ...]] = {
    "3d": ("3d rendering", "cgi", "three dimensional", "clay render"),
    "flat": ("vector art", "flat vector art", "flat illustration", "minimalist vector"),
    "cartoon": ("toon", "comic style", "cartoonish", "animated style"),
    "sticker": ("sticker art", "decal", "die cut sticker"),
}  # fmt: skip

# What says nothing that a small picture could show: what prompts begin with, what stands between two things, where a
# thing may be, and what prompts, and negative ones, end with.
OPENINGS = (
    "a photo of", "photo of", "a photograph of", "portrait of", "an illustration of", "a painting of", "close-up of",
    "a close up of", "a sketch of", "a drawing of", "a picture of", "an image of", "a detailed portrait of",
    "digital painting of", "generate", "draw", "show me", "i want", "please draw", "there is", "an oil painting of",
    "a watercolor of", "a professional photograph of", "macro shot of",
)  # fmt: skip
LINKS = (
    "and", "and", "beside", "with", "next to", "near", "together with", "and also", "in front of", "sitting on",
    "holding",
)  # fmt: skip
PLACES = "in", "on", "at", "under", "near", "over", "behind", "with", "through", "beside", "inside", "from"
PRAISE = (
    "highly detailed", "8k", "4k", "hd", "uhd", "masterpiece", "best quality", "trending on artstation",
    "octane render", "unreal engine", "cinematic lighting", "cinematic", "studio lighting", "soft lighting",
    "dramatic lighting", "golden hour", "bokeh", "sharp focus", "depth of field", "photorealistic", "realistic",
    "hyperrealistic", "ultra detailed", "intricate details", "digital art", "concept art", "studio ghibli style",
    "pixar style", "by greg rutkowski", "award winning", "professional", "vibrant colors", "pastel colors", "dslr",
    "35mm", "film grain", "wide angle", "macro", "isometric", "low poly", "fantasy", "epic", "moody",
    "volumetric light", "ray tracing", "hdr", "high resolution", "raw photo", "symmetrical", "elegant", "smooth",
    "cozy", "whimsical", "minimalistic", "clean lines", "centered", "product photo", "illustration", "artwork",
    "national geographic", "at sunset", "at night", "in the forest", "in space", "on a table", "on a wooden table",
    "in a city", "in the rain", "on the beach", "in the snow", "in a garden", "wearing a hat", "wearing sunglasses",
    "watercolor", "oil painting", "pencil sketch", "cyberpunk", "steampunk", "vaporwave", "anime", "kawaii", "chibi",
)  # fmt: skip
MORE_FAULTS = (
    "lowres", "bad hands", "missing fingers", "extra fingers", "extra arms", "mutated", "mutation", "mutated hands",
    "fused fingers", "error", "jpeg", "artifacts", "username", "logo", "duplicate", "morbid", "out of frame",
    "bad proportions", "cloned face", "gross", "long neck", "poorly drawn hands", "poorly drawn face", "overexposed",
    "underexposed", "oversaturated", "normal quality", "amateur", "unfinished", "messy", "dull", "nsfw", "frame",
    "border", "letters", "compression", "noise", "blurred", "fuzzy", "disgusting",
)  # fmt: skip
