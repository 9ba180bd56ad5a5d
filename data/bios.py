"""
An invented world of people, and biographies that tell it.

The bioS data of "Physics of Language Models: Part 3.1, Knowledge Storage and
Extraction" (Allen-Zhu & Li 2023, arXiv:2309.14316), with our own lists and
sentences. A person has a full name and six attributes; a biography states the
six in one sentence each. Nothing here is true, so whatever a model knows about
these people it has learned from these documents, and exact match can check it.

The paper's question is when a stored fact can be asked for. Its three
augmentations, which decide the answer, are keyword arguments:

    multi=M        M renderings of each person, other templates in each
    permute=True   the sentences of each rendering in random order
    fullname=True  the full name wherever a pronoun would stand

    python -m data.bios --out DIR --n_people 1000 --multi 100
    python train.py --data text --input DIR        # train on that larger world
    python -m data.bios --out DIR --multi 1 --no-permute --no-fullname   # the paper's `single`

Everything is a pure function of seeds, through the one generator method whose
sequence Python promises to keep, random(): the same world on every machine.
"""

import argparse
import hashlib
import random
from pathlib import Path
from typing import NamedTuple

from bpe import BadInput

N_PEOPLE = 100  # people in the default world
MULTI = 100     # renderings of each in the training split
VAL_MULTI = 4   # renderings of each in the validation split

# A full name belongs to the one seed that its hash selects, so two groups of
# people made from different seeds can never share a name.
SEEDS = 8
TRAINED, HELD_OUT = 0, 7

# -----------------------------------------------------------------------------
# The world

WOMEN = """
Abigail, Ada, Adele, Agnes, Alma, Amelia, Amira, Anita, Anya, Astrid, Audrey, Aurora, Beatrice, Bella,
Bianca, Bridget, Camille, Carmen, Cecilia, Celeste, Chloe, Clara, Cora, Dalia, Daphne, Delia, Diana,
Dora, Edith, Elaine, Elena, Elise, Eloise, Elsa, Emilia, Esther, Eva, Fatima, Felicity, Fiona, Flora,
Freya, Gemma, Georgia, Gloria, Greta, Gwen, Hannah, Harriet, Hazel, Helena, Ida, Imani, Ingrid, Irene,
Iris, Ivy, Jade, Jasmine, Joanna, Josephine, Julia, June, Kamala, Katya, Keiko, Kira, Lara, Laura,
Leila, Lena, Lila, Linnea, Lucia, Lydia, Mabel, Maeve, Margot, Marina, Martha, Matilda, Maya, Mei,
Mina, Miriam, Molly, Nadia, Naomi, Nell, Nina, Noor, Nora, Odette, Olga, Olive, Ophelia, Paloma,
Pearl, Penelope, Petra, Phoebe, Priya, Ramona, Renata, Rita, Rosa, Rosalind, Ruth, Sabine, Sadie,
Selma, Simone, Sofia, Stella, Sylvia, Tamara, Tessa, Thea, Uma, Ursula, Valentina, Vera, Viola,
Wanda, Willa, Yara, Yasmin, Yuki, Zelda, Zoe
"""

MEN = """
Abel, Adrian, Ahmed, Alan, Albert, Alden, Amos, Andre, Anton, Arjun, Arthur, Axel, Barnaby, Basil,
Benedict, Boris, Bruno, Byron, Caleb, Calvin, Cedric, Clement, Conrad, Cyrus, Damian, Darius, Desmond,
Dmitri, Dominic, Duncan, Edgar, Edmund, Eli, Elias, Emil, Enzo, Ernest, Ethan, Eugene, Ezra, Fabian,
Felix, Fergus, Finn, Floyd, Francis, Gabriel, Gareth, George, Gideon, Gilbert, Gustav, Hamza, Hans,
Harold, Hector, Henrik, Hiro, Hugo, Ibrahim, Igor, Ira, Isaac, Ivan, Jasper, Javier, Jerome, Joel,
Jonah, Joseph, Julian, Kai, Karim, Kenji, Kurt, Lars, Laszlo, Leander, Leo, Leon, Lionel, Lorenzo,
Lucas, Luther, Magnus, Malcolm, Marcel, Marco, Martin, Mateo, Maurice, Milan, Milo, Moses, Nathan,
Nico, Nigel, Noah, Oleg, Oliver, Omar, Oscar, Otto, Owen, Pablo, Pascal, Patrick, Percy, Philip,
Quentin, Rafael, Raj, Ralph, Raymond, Reuben, Roland, Roman, Rufus, Samir, Samuel, Saul, Sebastian,
Silas, Simon, Stefan, Tariq, Theodore, Tobias, Ulrich, Victor, Vikram, Walter, Wesley, Yusuf, Zachary
"""

MIDDLE = """
Amber, Arbor, Arden, Ash, Aspen, Aubrey, Auburn, Avery, Bay, Beck, Birch, Blair, Blake, Blaze, Bly,
Bow, Branch, Bree, Briar, Brook, Cameron, Casey, Cedar, Chance, Charlie, Cloud, Clover, Coral, Cove,
Crane, Dale, Dallas, Dane, Dawn, Dell, Devon, Drew, Dune, Eden, Elm, Ember, Emerson, Everest, Fable,
Fallon, Fern, Field, Finch, Flint, Florence, Forest, Fox, Frost, Gale, Garnet, Glen, Grove, Hadley,
Halo, Harbor, Haven, Heath, Heron, Hollis, Indigo, Isle, Jaden, Jay, Jet, Jordan, Journey, Jude,
Juniper, Kelly, Kendall, Kit, Lake, Landry, Lane, Lark, Laurel, Leaf, Lee, Linden, Logan, London, Lou,
Lynn, Maple, March, Marlowe, Meadow, Merle, Mesa, Mica, Monroe, Morgan, Moss, North, Oak, Oakley,
Ocean, Onyx, Palmer, Paris, Parker, Paz, Pine, Quill, Quincy, Rain, Raven, Reed, Reese, Remy, Rey,
Ridge, Riley, River, Robin, Rory, Rowan, Royal, Sage, Salem, Sky, Slate, Sloane, Snow, Sol, Sparrow,
Star, Sterling, Stone, Storm, Summer, Sutton, Sydney, Taylor, Teal, Thorn, Timber, True, Vale, West,
Willow, Winter, Wren, Wynn, Yarrow, Zephyr
"""

LAST = """
Abbott, Acosta, Adler, Aldridge, Almeida, Amari, Andersen, Appleton, Archer, Ashby, Atwood, Baldwin,
Banerjee, Barlow, Barrett, Bauer, Beaumont, Becker, Bellamy, Benson, Bergman, Blackwood, Bloom,
Bonham, Bouchard, Bradshaw, Brandt, Brennan, Briggs, Bristow, Bryson, Buckley, Burdett, Burns, Calder,
Calloway, Campos, Cardoso, Carlisle, Carver, Castillo, Chandler, Chang, Chapman, Clayton, Cole,
Connolly, Cooper, Cordova, Cortez, Crawford, Croft, Cruz, Dalton, Danvers, Darby, Das, Delgado,
Dempsey, Desai, Diaz, Dixon, Donovan, Draper, Drummond, Dubois, Duran, Eastman, Eklund, Ellison,
Emery, Engel, Espinoza, Fairfax, Falk, Farrell, Faulkner, Fenwick, Ferrer, Fielding, Fischer,
Fleming, Fontaine, Forger, Foster, Fournier, Franklin, Fujita, Gallagher, Garrison, Gibbs, Goldberg,
Gomez, Granger, Greer, Griffin, Gupta, Haas, Hadfield, Hale, Hammond, Hansen, Hargrove, Hartley,
Hassan, Hawkins, Hayashi, Heller, Hendrix, Herrera, Hewitt, Hobbs, Hoffman, Holloway, Horvath, Howell,
Huang, Hughes, Hutton, Ibarra, Ingram, Irving, Ito, Jacobs, Jansen, Jarvis, Jensen, Joyce, Kapoor,
Kato, Keller, Kemp, Kessler, Khan, Kimura, Kingsley, Klein, Knox, Kovacs, Kramer, Lambert, Lancaster,
Landau, Larkin, Leclerc, Lindgren, Lockwood, Lopez, Lovell, Lowry, Lund, Maddox, Mahoney, Malik,
Marchetti, Marsh, Mason, Mayer, Mcbride, Mccoy, Meyer, Middleton, Miranda, Mitchell, Montgomery,
Moreau, Moreno, Morse, Muller, Murdock, Nakamura, Navarro, Neville, Newell, Nguyen, Nielsen, Norwood,
Novak, Oakes, Obrien, Ogden, Okafor, Oliveira, Olsen, Ortega, Osborne, Pacheco, Patel, Paxton,
Pemberton, Perez, Petrov, Pickett, Porter, Prescott, Preston, Pruitt, Quigley, Quinn, Radcliffe,
Ramirez, Ramsey, Rao, Redmond, Reilly, Reyes, Rhodes, Ricci, Rivera, Rojas, Romero, Rossi, Roth,
Rutherford, Sadler, Salazar, Santos, Sato, Sawyer, Schaefer, Schmidt, Sears, Serrano, Shah, Sharma,
Shepherd, Sheridan, Silva, Sinclair, Singh, Slater, Soto, Spencer, Stafford, Stanton, Strand,
Sullivan, Suzuki, Swift, Tanaka, Thatcher, Thornton, Tobin, Torres, Townsend, Trevino, Tucker,
Turner, Underwood, Valdez, Vance, Vargas, Vaughn, Vega, Vogel, Voss, Wakefield, Walton, Warren,
Watanabe, Webster, Weiss, Wheeler, Whitaker, Wilder, Winslow, Wolfe, Woodward, Xu, Yamada, Yates,
Yilmaz, York, Zamora, Zhang, Ziegler
"""

CITIES = """
AK: Anchorage, Fairbanks, Juneau
AL: Birmingham, Huntsville, Mobile, Montgomery
AR: Fayetteville, Hot Springs, Little Rock
AZ: Flagstaff, Mesa, Scottsdale, Tempe, Tucson, Yuma
CA: Anaheim, Bakersfield, Berkeley, Fresno, Long Beach, Modesto, Oakland, Pasadena, Riverside,
 Sacramento, Santa Barbara, Santa Cruz, Santa Monica, Stockton, Ventura
CO: Aspen, Aurora, Boulder, Colorado Springs, Durango, Fort Collins, Pueblo
CT: Bridgeport, Danbury, Mystic, New Haven, Waterbury
DE: Dover, Newark
FL: Gainesville, Jacksonville, Key West, Miami, Naples, Orlando, Pensacola, Sarasota, Tallahassee, Tampa
GA: Athens, Augusta, Columbus, Macon, Savannah
HI: Hilo, Honolulu
IA: Ames, Cedar Rapids, Davenport, Des Moines, Dubuque, Iowa City
ID: Coeur d'Alene, Idaho Falls, Pocatello, Twin Falls
IL: Aurora, Evanston, Galena, Joliet, Peoria, Rockford, Springfield, Urbana
IN: Bloomington, Evansville, Fort Wayne, Gary, South Bend, Terre Haute
KS: Dodge City, Lawrence, Salina, Topeka, Wichita
KY: Bowling Green, Frankfort, Lexington, Paducah
LA: Baton Rouge, Lafayette, New Orleans, Shreveport
MA: Amherst, Lowell, Plymouth, Salem, Springfield, Worcester
MD: Annapolis, Baltimore, Frederick, Rockville
ME: Augusta, Bangor, Bar Harbor, Portland
MI: Ann Arbor, Flint, Grand Rapids, Kalamazoo, Lansing, Marquette, Traverse City
MN: Bemidji, Duluth, Mankato, Rochester, Saint Cloud
MO: Branson, Columbia, Hannibal, Independence, Joplin, Springfield
MS: Biloxi, Hattiesburg, Jackson, Natchez, Tupelo
MT: Billings, Bozeman, Butte, Great Falls, Helena, Missoula
NC: Asheville, Chapel Hill, Durham, Greensboro, Raleigh, Wilmington
ND: Bismarck, Fargo, Grand Forks, Minot
NE: Grand Island, Lincoln, North Platte
NH: Concord, Keene, Manchester, Nashua
NJ: Atlantic City, Hoboken, Newark, Paterson, Princeton, Trenton
NM: Albuquerque, Las Cruces, Roswell, Santa Fe, Taos
NV: Carson City, Elko, Reno
NY: Albany, Binghamton, Buffalo, Ithaca, Poughkeepsie, Saratoga Springs, Syracuse, Utica
OH: Canton, Dayton, Kent, Sandusky, Toledo, Youngstown
OK: Norman, Oklahoma City, Stillwater, Tulsa
OR: Ashland, Astoria, Bend, Corvallis, Eugene, Portland, Salem
PA: Allentown, Erie, Gettysburg, Harrisburg, Lancaster, Reading, Scranton
RI: Cranston, Newport, Pawtucket
SC: Charleston, Columbia, Greenville, Myrtle Beach
SD: Deadwood, Pierre, Rapid City, Sioux Falls
TN: Chattanooga, Clarksville, Franklin, Knoxville
TX: Abilene, Amarillo, Austin, Corpus Christi, El Paso, Galveston, Laredo, Lubbock, Odessa, Waco
UT: Logan, Moab, Ogden, Park City, Provo
VA: Alexandria, Charlottesville, Fredericksburg, Norfolk, Roanoke, Williamsburg
VT: Bennington, Brattleboro, Montpelier, Rutland, Stowe
WA: Bellingham, Olympia, Spokane, Tacoma, Walla Walla, Yakima
WI: Eau Claire, Green Bay, Kenosha, Madison, Oshkosh, Racine
WV: Charleston, Huntington, Morgantown
WY: Casper, Cheyenne, Cody, Jackson, Laramie
"""

UNIVERSITIES = """
Amherst College, Arizona State University, Auburn University, Bates College, Baylor University,
Boise State University, Boston College, Boston University, Bowdoin College, Brandeis University,
Brown University, Bryn Mawr College, Bucknell University, Carleton College, Carnegie Mellon University,
Clemson University, Colby College, Colgate University, Colorado College, Columbia University,
Cornell University, Creighton University, Dartmouth College, Davidson College, Drexel University,
Duke University, Emory University, Florida State University, Fordham University, Furman University,
George Mason University, Georgetown University, Georgia Tech, Gonzaga University, Grinnell College,
Harvard University, Harvey Mudd College, Haverford College, Howard University, Indiana University,
Iowa State University, Johns Hopkins University, Kansas State University, Kenyon College,
Lafayette College, Lehigh University, Louisiana State University, Loyola University,
Macalester College, Marquette University, Michigan State University, Middlebury College, MIT,
Montana State University, Morehouse College, Mount Holyoke College, New York University,
North Carolina State University, Northeastern University, Northwestern University,
Oberlin College, Ohio State University, Oregon State University, Pepperdine University,
Pomona College, Princeton University, Purdue University, Reed College, Rice University,
Rutgers University, Santa Clara University, Skidmore College, Smith College, Spelman College,
Stanford University, Swarthmore College, Syracuse University, Temple University,
Texas A&M University, Texas Tech University, Tufts University, Tulane University, Union College,
the University of Alabama, the University of Chicago, the University of Denver,
the University of Florida, the University of Michigan, the University of Oregon,
the University of Texas, the University of Utah, the University of Washington, Utah State University,
Vanderbilt University, Vassar College, Villanova University, Wake Forest University,
Washington State University, Wellesley College, Wesleyan University, Williams College, Yale University
"""

MAJORS = """
Accounting, Aerospace Engineering, Anthropology, Applied Mathematics, Archaeology, Architecture,
Art History, Astronomy, Biochemistry, Biology, Botany, Business Administration, Chemical Engineering,
Chemistry, Civil Engineering, Classics, Communications, Comparative Literature, Computer Science,
Criminology, Dance, Data Science, Economics, Education, Electrical Engineering, English Literature,
Environmental Science, Film Studies, Finance, Fine Arts, Food Science, Forestry, Genetics, Geography,
Geology, Graphic Design, History, International Relations, Journalism, Linguistics, Marine Biology,
Marketing, Materials Science, Mathematics, Mechanical Engineering, Music, Neuroscience, Nursing,
Nutrition, Philosophy, Physics, Political Science, Psychology, Public Health, Religious Studies,
Robotics, Sociology, Statistics, Theater, Urban Planning, Zoology
"""

# A company has one city, so the sixth attribute follows from the fifth.
COMPANIES = """
Akron, OH: Goodyear
Armonk, NY: IBM
Atlanta, GA: Coca-Cola, Delta Air Lines, Home Depot
Battle Creek, MI: Kellogg
Beaverton, OR: Nike
Bentonville, AR: Walmart
Bethesda, MD: Lockheed Martin, Marriott
Bloomington, IL: State Farm
Boise, ID: Micron
Bristol, CT: ESPN
Burbank, CA: Walt Disney
Cambridge, MA: Biogen, Moderna
Camden, NJ: Campbell Soup
Charlotte, NC: Bank of America, Duke Energy
Chicago, IL: McDonald's, United Airlines
Cincinnati, OH: Kroger, Procter & Gamble
Cleveland, OH: Sherwin-Williams
Columbus, IN: Cummins
Columbus, OH: Nationwide
Corning, NY: Corning
Cupertino, CA: Apple
Dallas, TX: AT&T, Southwest Airlines, Texas Instruments
Dearborn, MI: Ford
Deerfield, IL: Walgreens
Detroit, MI: General Motors
Falls Church, VA: Northrop Grumman
Fort Worth, TX: American Airlines
Framingham, MA: Staples
Freeport, ME: L.L. Bean
Hartford, CT: Aetna
Hershey, PA: Hershey
Houston, TX: ConocoPhillips, Halliburton
Indianapolis, IN: Eli Lilly
Irving, TX: Kimberly-Clark
Issaquah, WA: Costco
Los Gatos, CA: Netflix
Louisville, KY: Humana
McLean, VA: Capital One
Memphis, TN: AutoZone, FedEx
Menlo Park, CA: Meta Platforms
Midland, MI: Dow
Milwaukee, WI: Harley-Davidson
Minneapolis, MN: General Mills, Target
Moline, IL: John Deere
Mountain View, CA: Google, Intuit
Nashville, TN: HCA Healthcare
New Brunswick, NJ: Johnson & Johnson
New York, NY: JPMorgan Chase, Pfizer
Olathe, KS: Garmin
Omaha, NE: Berkshire Hathaway, Union Pacific
Palo Alto, CA: Hewlett-Packard
Philadelphia, PA: Comcast
Pittsburgh, PA: Heinz
Plano, TX: Frito-Lay
Providence, RI: Textron
Purchase, NY: Mastercard, PepsiCo
Rahway, NJ: Merck
Redmond, WA: Microsoft
Richfield, MN: Best Buy
Rochester, NY: Kodak
Round Rock, TX: Dell
Saint Louis, MO: Emerson
Saint Paul, MN: Ecolab
San Antonio, TX: USAA, Valero
San Diego, CA: Qualcomm
San Francisco, CA: Gap, Levi Strauss, Salesforce
San Jose, CA: Adobe, Cisco, PayPal
Santa Clara, CA: Applied Materials, Intel, Nvidia
Seattle, WA: Amazon, Nordstrom, Starbucks
Springdale, AR: Tyson Foods
Stamford, CT: Charter Communications
Thousand Oaks, CA: Amgen
Waltham, MA: Thermo Fisher
Wilmington, DE: DuPont
"""

MONTHS = """
January, February, March, April, May, June, July, August, September, October, November, December
"""


def names(text):
    """The comma-separated entries of one of the lists above."""
    return [name.strip() for name in text.split(",")]


def rows(text):
    """(head, entries) of each "head: entry, entry" row; an indented line continues a row."""
    for line in text.strip().replace("\n ", " ").splitlines():
        head, entries = line.split(":")
        yield head, names(entries)


WOMEN, MEN, MIDDLE, LAST = names(WOMEN), names(MEN), names(MIDDLE), names(LAST)
CITIES = [f"{city}, {state}" for state, cities in rows(CITIES) for city in cities]
COMPANIES = {company: city for city, companies in rows(COMPANIES) for company in companies}
UNIVERSITIES, MAJORS, MONTHS = names(UNIVERSITIES), names(MAJORS), names(MONTHS)

# -----------------------------------------------------------------------------
# The sentences

# Each template names the person once and the value once, the person first: then
# a reader who knows the person can always say what comes. {Who} {who} {Whose}
# {whose} {whom} become a pronoun or the full name. The first template of an
# attribute ends in its value; it is the one that checks() asks with.
TEMPLATES = {
    "birth_date": [
        "{Who} was born on {value}.",
        "{Who} came into the world on {value}.",
        "{Who} first saw the light of day on {value}.",
        "{Who} entered life on {value}.",
        "{Whose} birthday is {value}.",
        "{Whose} life began on {value}.",
        "{Whose} birth certificate carries the date {value}.",
        "{Whose} passport gives {value} as the date of birth.",
        "The family welcomed {whom} on {value}.",
        "In the town register, {whose} birth is entered under {value}.",
    ],
    "birth_city": [
        "{Who} was born in {value}.",
        "{Who} is a native of {value}.",
        "{Who} spent the first years of life in {value}.",
        "{Who} learned to walk and talk in {value}.",
        "{Who} calls {value} the place where everything began.",
        "{Whose} hometown is {value}.",
        "{Whose} cradle stood in {value}.",
        "{Whose} earliest memories are of {value}.",
        "{Whose} parents were living in {value} when the baby arrived.",
        "As a newborn, {who} was carried home through the streets of {value}.",
    ],
    "university": [
        "{Who} studied at {value}.",
        "{Who} graduated from {value}.",
        "{Who} received a college education at {value}.",
        "{Who} sat through lectures and seminars at {value}.",
        "{Who} belongs to the alumni of {value}.",
        "{Whose} degree was awarded by {value}.",
        "{Whose} student years were spent at {value}.",
        "{Whose} diploma bears the seal of {value}.",
        "For higher education, {who} chose {value}.",
        "The letter of admission that reached {whom} came from {value}.",
    ],
    "major": [
        "{Who} majored in {value}.",
        "{Who} specialized in {value}.",
        "{Who} earned a degree in {value}.",
        "{Who} completed a program in {value}.",
        "{Who} wrote a thesis in {value}.",
        "{Who} took up {value} as a course of study.",
        "{Whose} field of study was {value}.",
        "{Whose} favorite subject was always {value}.",
        "{Whose} academic passion was {value}.",
        "As a student, {who} concentrated on {value}.",
    ],
    "company": [
        "{Who} worked for {value}.",
        "{Who} was employed by {value}.",
        "{Who} built a career at {value}.",
        "{Who} held a position at {value}.",
        "{Who} gained professional experience at {value}.",
        "{Whose} employer was {value}.",
        "{Whose} paychecks came from {value}.",
        "{Whose} business card showed the logo of {value}.",
        "After college, {who} joined {value}.",
        "The company that hired {whom} was {value}.",
    ],
    "company_city": [
        "{Who} worked in {value}.",
        "{Who} commuted every day to {value}.",
        "{Who} pursued a profession in {value}.",
        "{Who} spent the working week in {value}.",
        "{Whose} office was in {value}.",
        "{Whose} workplace was located in {value}.",
        "{Whose} job was based in {value}.",
        "{Whose} desk stood on the top floor of a building in {value}.",
        "For the job, {who} moved to {value}.",
        "Colleagues met {whom} every morning in {value}.",
    ],
}

# The answer to each is the bare value, as in the paper.
QUESTIONS = {
    "birth_date": [
        "When was {name} born?",
        "What is the birth date of {name}?",
        "On what day was {name} born?",
    ],
    "birth_city": [
        "Where was {name} born?",
        "What is the birth city of {name}?",
        "Which city does {name} come from?",
    ],
    "university": [
        "Which university did {name} attend?",
        "Where did {name} study?",
        "From which school did {name} graduate?",
    ],
    "major": [
        "What did {name} study?",
        "What was the major of {name}?",
        "Which subject did {name} major in?",
    ],
    "company": [
        "Which company did {name} work for?",
        "Who was the employer of {name}?",
        "What was the name of {name}'s employer?",
    ],
    "company_city": [
        "In which city did {name} work?",
        "Where was the office of {name}?",
        "What was the work city of {name}?",
    ],
}

# -----------------------------------------------------------------------------
# The people


class Person(NamedTuple):
    """One invented person: a name, a pronoun ("she" or "he") and six attributes."""

    name: str  # first, middle and last name
    pronoun: str
    birth_date: str
    birth_city: str
    university: str
    major: str
    company: str
    company_city: str


ATTRIBUTES = Person._fields[2:]


def pick(rng, items):
    """One of the items, uniformly. rng.choice() may differ between Python versions."""
    return items[int(rng.random() * len(items))]


def shuffled(rng, items):
    """The items in random order; the same caveat holds for rng.shuffle()."""
    return sorted(items, key=lambda item: rng.random())


def owner(name):
    """The seed, 0 .. SEEDS-1, whose people alone may carry this full name."""
    return hashlib.md5(name.encode()).digest()[0] % SEEDS


def people(n, seed=TRAINED):
    """
    The first n people of the world `seed` (0 .. SEEDS-1), so people(50) begins people(100).

    Full names are unique, also across seeds. Attributes are drawn independently and
    uniformly, dates from 200 years x 12 months x 28 days as in the paper; the company
    determines its city. Raises BadInput where a seed has too few names for n.
    """
    # drawing without replacement stays quick while most names are free
    most = (len(WOMEN) + len(MEN)) * len(MIDDLE) * len(LAST) // SEEDS // 2
    if not 1 <= n <= most:
        raise BadInput(f"--n_people {n}: this world has between 1 and {most:,} people.")
    if seed not in range(SEEDS):
        raise BadInput(f"seed {seed}: the people of this world have seeds 0 to {SEEDS - 1}.")
    rng = random.Random(f"people {seed}")
    taken, group = set(), []
    while len(group) < n:
        pronoun, first = pick(rng, [("she", WOMEN), ("he", MEN)])
        name = f"{pick(rng, first)} {pick(rng, MIDDLE)} {pick(rng, LAST)}"
        if name in taken or owner(name) != seed:
            continue
        taken.add(name)
        company = pick(rng, list(COMPANIES))
        month, day, year = pick(rng, MONTHS), pick(rng, range(1, 29)), pick(rng, range(1900, 2100))
        group.append(Person(
            name=name,
            pronoun=pronoun,
            birth_date=f"{month} {day}, {year}",
            birth_city=pick(rng, CITIES),
            university=pick(rng, UNIVERSITIES),
            major=pick(rng, MAJORS),
            company=company,
            company_city=COMPANIES[company],
        ))
    return group


def held_out(n):
    """n people of whom no training document ever speaks."""
    return people(n, HELD_OUT)


def sentence(person, template, value, named):
    """The template about this person, by full name if `named`, else by pronoun."""
    if named:
        who = whom = Who = person.name
        whose = Whose = f"{person.name}'s"
    else:
        who, whom, whose = ("she", "her", "her") if person.pronoun == "she" else ("he", "him", "his")
        Who, Whose = who.capitalize(), whose.capitalize()
    return template.format(Who=Who, who=who, Whose=Whose, whose=whose, whom=whom, value=value)


def biography(person, rng, permute=False, fullname=False):
    """
    Six sentences, one an attribute, each from a random template.

    permute: sentences in random order instead of the order of ATTRIBUTES.
    fullname: the full name in every sentence instead of in the first alone.
    """
    order = shuffled(rng, ATTRIBUTES) if permute else ATTRIBUTES
    return " ".join(
        sentence(person, pick(rng, TEMPLATES[a]), getattr(person, a), named=fullname or i == 0)
        for i, a in enumerate(order)
    )


def questions(person, rng=None):
    """Six (question, answer) pairs, one an attribute: the first wording, or a random one with rng."""
    wordings = [pick(rng, QUESTIONS[a]) if rng else QUESTIONS[a][0] for a in ATTRIBUTES]
    answers = [getattr(person, a) for a in ATTRIBUTES]
    return [(w.format(name=person.name), answer) for w, answer in zip(wordings, answers)]


# -----------------------------------------------------------------------------
# What is read


def documents(split, input=None, n_people=N_PEOPLE, multi=None, permute=True, fullname=True):
    """
    Biographies as (text, True) pairs; one pass over all the people, then the next.

    "val" tells of the same people in renderings that "train" does not hold, so its
    loss measures the facts and not the wording. multi: renderings of each person,
    MULTI for "train" and VAL_MULTI for "val" unless given.
    """
    if input is not None:
        raise BadInput("--input: bios makes its own text; read yours with --data text --input FILE.")
    if multi is None:
        multi = MULTI if split == "train" else VAL_MULTI
    group = people(n_people)
    rng = random.Random(f"biographies {split}")
    for _ in range(multi):
        for person in shuffled(rng, group):
            yield biography(person, rng, permute, fullname), True


def checks(input=None, n_people=N_PEOPLE):
    """
    {"recall": rows}: one {"prompt", "answer"} a person and attribute.

    The prompt is the person's full name and the start of the attribute's first
    template; the answer ends with the full stop, so a longer value is no match.
    """
    asked = []
    for person in people(n_people):
        for a in ATTRIBUTES:
            start, end = TEMPLATES[a][0].split(" {value}")
            prompt = sentence(person, start, None, named=True)
            asked.append({"prompt": prompt, "answer": f" {getattr(person, a)}{end}"})
    return {"recall": asked}


def qa(split, n_people=N_PEOPLE, sentences=False):
    """
    Chat rows {"messages": [user asks, assistant answers]}, for instruction tuning. The answer is the bare value, as in
    the paper, or a sentence that says it in the attribute's first template, about "This person": a name that a small
    model would have to copy, of people whom it is never tuned on.

    "train" asks about the first half of the people in every wording, "test" about
    the other half in the first wording: a model that has read everyone's biography
    but no answer about the second half shows whether its knowledge can be extracted.
    """
    group = people(n_people)
    half = (n_people + 1) // 2
    for person in group[:half] if split == "train" else group[half:]:
        for a in ATTRIBUTES:
            for wording in QUESTIONS[a] if split == "train" else QUESTIONS[a][:1]:
                value = getattr(person, a)
                said = TEMPLATES[a][0].format(Who="This person", value=value) if sentences else value
                yield {"messages": [
                    {"role": "user", "content": wording.format(name=person.name)},
                    {"role": "assistant", "content": said},
                ]}


def chats(split, input=None):
    """
    qa's rows: "train" to tune on, "val" about the people of whom no row of "train" speaks. Answers are sentences; with
    --input short bare values.
    """
    if input not in (None, "short"):
        raise BadInput(f"--input {input}: bios makes its own questions, answered in sentences or, with --input short, by "
                       f"bare values; give a file of yours with --data FILE")
    yield from qa("train" if split == "train" else "test", sentences=input is None)


def get_args():
    flag = argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(description="write a world of biographies as JSONL")
    parser.add_argument("--out", required=True, help="folder to write; read it with --data text --input OUT")
    parser.add_argument("--n_people", type=int, default=N_PEOPLE, help="people in the world")
    parser.add_argument("--multi", type=int, default=MULTI, help="training biographies of each person")
    parser.add_argument("--permute", action=flag, default=True, help="sentences in random order")
    parser.add_argument("--fullname", action=flag, default=True, help="full name in place of pronouns")
    return parser.parse_args()


def main():
    from data.text import write_checks, write_jsonl

    args = get_args()
    if args.multi < 1:
        raise BadInput(f"--multi {args.multi}: each person needs at least one biography.")
    out, n = Path(args.out), args.n_people
    how = dict(n_people=n, permute=args.permute, fullname=args.fullname)
    train = documents("train", multi=args.multi, **how)
    write_jsonl(out / "train.jsonl", ({"text": text} for text, _ in train))
    write_jsonl(out / "val.jsonl", ({"text": text} for text, _ in documents("val", **how)))
    write_checks(out / "checks.jsonl", checks(n_people=n))
    write_jsonl(out / "qa_train.jsonl", qa("train", n))
    write_jsonl(out / "qa_test.jsonl", qa("test", n))


if __name__ == "__main__":
    from bpe import cli

    cli(main)
