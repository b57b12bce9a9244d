"""Write the two demo datasets, ``triage/`` and ``dates/``, beside this script.

Run ``python examples/data/make_data.py``. The output depends on nothing but this file, so a second
run rewrites the same bytes. Every sentence pattern belongs either to the training rows or to the
held-out rows, never to both: a held-out prompt is new in wording, not just in its details.
"""

import datetime
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
Row = dict[str, str]

HELDOUT_PER_QUEUE = 6
TRAIN_PER_QUEUE = 40
DATES_TRAIN, DATES_HELDOUT = 400, 60

# A ticket pattern may hold {one|of|these} choices, spelt out by `expand`.
TICKETS: dict[str, list[str]] = {
    "billing/duplicate-charge": [
        "I was charged twice for my {June|March|October} invoice",
        "Two identical payments {left my account|show on my card} for a single order",
        "My bank statement lists the same {purchase|payment} two times",
        "Why did you take the {monthly|annual} fee twice?",
        "There is a second charge for {the same order|order 4471} on my credit card",
        "You billed me double for {one pair of boots|one lamp|a single chair}",
        "I only bought one {kettle|jacket} but paid for it twice",
        "The payment went through {twice|two times} when I refreshed the page",
        "My subscription was debited {twice this month|two times in May}",
        "I pressed pay once and got {two charges|two debits}",
        "{PayPal|My bank} shows a repeated transaction from your shop",
        "Same amount, same day, charged {twice|two times over}. Please put it right",
        "Please reverse the {extra|second} payment, I already paid for this order",
        "My card was hit with {two|three} identical charges yesterday",
        "It seems the checkout billed my {debit|credit} card a second time",
        "I see a double payment of {19.99|45.00|8.50} from you",
        "One order, two withdrawals from my {checking account|savings}",
        "You have taken the {deposit|fee} from my bank two times",
        "Double charge on my {Visa|Mastercard} for the same basket",
        "I have been paying twice {every month|since April} for one subscription",
        "The transaction was duplicated and I am {40 dollars|60 euros} short",
        "My husband noticed we were charged {twice|double} for the sofa",
        "An error page appeared, I tried again, and now I have {two|2} charges",
        "Can you cancel the duplicate {payment|charge}? I owe it only once",
        "The same {bill|fee} was collected twice from my account",
        "Billed two times for one {gift card|phone case}, please fix this",
    ],
    "billing/invoice-copy": [
        "Could you send me a copy of my {June|January} invoice?",
        "I need a {PDF|printed} receipt for my tax return",
        "Where can I download the invoice for {my last order|order 2093}?",
        "My accountant wants {an official invoice|a proper bill} for this purchase",
        "Please email the receipt for the {desk|printer} I bought",
        "I lost the {invoice|receipt}, can I have another one?",
        "The invoice should show our {company name|tax number}, please reissue it",
        "No receipt was in the {box|email}, and I need it for my expenses",
        "Can I get a VAT invoice for {the office chairs|our order}?",
        "{My boss|Finance} needs the paperwork for last month's bill",
        "I would like {an invoice|a receipt} made out to my business",
        "Send me all the invoices from {2022|last year}, please",
        "How do I print {a receipt|an invoice} from my order history?",
        "I never received the invoice for my {May|April} purchase",
        "To claim expenses I need a {copy of the bill|receipt from you}",
        "Please forward the {invoice|bill} to accounts at our firm",
        "The link to my {invoice|receipt} has expired, can you send the document?",
        "I require {proof of purchase|a receipt} for the warranty",
        "Our bookkeeper is missing {one invoice|two invoices} from you",
        "Can you resend the {receipt|invoice}? I deleted the email",
        "We need an itemised {bill|receipt} for the audit",
        "Is there {a PDF|a paper copy} of the invoice I could keep on file?",
        "I am doing my taxes and cannot find your {invoice|receipt}",
        "Please mail me a stamped {receipt|invoice} for the insurance",
        "A copy of the {bill|invoice} for order 7788 would be great",
        "My {employer|university} will pay me back if I show an invoice",
    ],
    "account/password-reset": [
        "I forgot my password and {cannot log in|am locked out}",
        "The reset link {never arrives|does not come} in my inbox",
        "Please help me set a new password for {my account|the site}",
        "It says my {password|login} is incorrect, but I typed it right",
        "My account is locked after {three|five} wrong attempts",
        "How do I {change|recover} my password?",
        "I can't sign in {any more|since yesterday}, the password is refused",
        "The {link|email} to reset my password has already expired",
        "I no longer remember {my login details|the password I chose}",
        "Can you unlock my {profile|account}? I mistyped my password",
        "I need a {new|temporary} password to get back in",
        "Logging in fails with wrong {password|credentials} every time",
        "My {son|cat} changed the password and now nobody knows it",
        "I clicked {forgot password|reset password} and nothing happened",
        "Your site rejects my password on {my laptop|my phone} every time",
        "The login code you {text|email} me is always invalid",
        "I am unable to log in after {the holidays|a long break}, password forgotten",
        "Please send the password {reset|recovery} email again",
        "My old password {stopped working|is not accepted}",
        "Sign-in keeps {failing|saying no} and I need to reset it",
        "I got locked out of my account, please {let me in|restore access}",
        "What do I do if I {lost|cannot recall} my password?",
        "Someone may know my password, how can I {reset|replace} it?",
        "The new password I {set|picked} is not letting me log in",
        "I want to log in, but the password is {lost|long forgotten}",
        "Could you {reset|clear} my password so I can sign in today?",
    ],
    "account/close-request": [
        "Please {delete|close} my account for good",
        "I want to {close my account|leave your service}",
        "How can I remove my {profile|account} permanently?",
        "Erase all {my personal data|the data you hold on me} and shut the account",
        "I no longer shop with you, so {delete my profile|close my account}",
        "Kindly terminate my {membership|account} with you",
        "I wish to {deactivate|cancel} my account at once",
        "My mother passed away, please close {her account|her profile}",
        "Under privacy law I ask you to {delete|erase} my data",
        "I do not want an account here {any more|any longer}",
        "Where is the button to {delete|close} an account?",
        "Take me off your system {completely|for ever}",
        "I have two profiles, please delete the {old|second} one",
        "Shut down my account and {forget my details|remove my data}",
        "I am done with your shop, {remove|cancel} my account",
        "Please wipe my {profile|details} from your database",
        "I signed up by {mistake|accident}, delete the account please",
        "I would like my account {closed|deleted} by Friday",
        "End my membership and {delete my profile|erase my details}",
        "Can you permanently {remove|deactivate} my user account?",
        "We are closing our business, so {close|delete} our account too",
        "I am moving abroad and want my account {gone|deleted}",
        "It is time to say goodbye, please {delete|cancel} my profile",
        "Unregister me and {delete|destroy} everything you store about me",
        "How long does it take to {close|delete} an account?",
        "I asked to have my account deleted {last week|in May} and it is still there",
    ],
    "shipping/late-parcel": [
        "My parcel was due {Monday|last Friday} and still has not come",
        "Where is my {order|package}? It is a week late",
        "The tracking page has not {moved|changed} for five days",
        "I have been waiting {two|three} weeks for my delivery",
        "Your courier promised {yesterday|Tuesday}, but nobody came",
        "The package is {stuck|sitting} at the depot since last week",
        "Still no sign of the {lamp|books} I ordered a month ago",
        "When will my {order|parcel} finally arrive?",
        "Delivery was meant to take two days and it has been {nine|ten}",
        "The {birthday|wedding} gift did not arrive in time",
        "My shipment seems to be {lost|delayed} in the post",
        "Tracking says delivered, but {no parcel came|nothing is here}",
        "I paid for express shipping and it is {late|overdue}",
        "The delivery keeps being {postponed|delayed}",
        "It has been ten days and my {shoes|curtains} have not been delivered",
        "The courier has {lost|misplaced} my package, I think",
        "Is there any news of my {late|delayed} delivery?",
        "I took a day off for the {delivery|courier} and nobody turned up",
        "My order left the warehouse {in May|ages ago} and never reached me",
        "The package should be here {by now|already}, can you trace it?",
        "Why is my delivery taking so {long|much time}?",
        "Nothing has been delivered yet and {I leave on Sunday|the party is today}",
        "The estimated delivery date {passed|was} four days ago",
        "Half the street got their parcels today, but {not me|mine is missing}",
        "I am still waiting for the {tent|blender} you shipped on the first",
        "The post van came and went again {without|but had not got} my parcel",
    ],
    "shipping/address-change": [
        "I moved house, please send my order to my new {address|flat}",
        "Can I change the delivery address for {order 1182|my order}?",
        "I typed the wrong {street|house} number at checkout",
        "Please ship it to my {office|work} instead of my home",
        "The postcode on my order is {wrong|incorrect}, please correct it",
        "I would like the parcel sent to {my neighbour|my sister} instead",
        "My shipping address is out of date, how do I {edit|update} it?",
        "We are relocating on {Friday|Monday}, deliver to the new place please",
        "Deliver to {12 Oak Lane|8 Mill Road} and not to the old address",
        "I forgot to add my {apartment|flat} number to the address",
        "Could you redirect my package to {a pickup point|another city}?",
        "The order is going to my {old|previous} address by mistake",
        "Please update my address to {5 Hill Street|21 Park Avenue}",
        "I picked the wrong saved address, can you {switch|change} it?",
        "Send the {sofa|table} to our holiday home instead",
        "There is a typo in my {street name|city}, can it be fixed before you ship?",
        "I now live in {Leeds|Denver}, please change where you send it",
        "Can the {courier|driver} take it to a different address?",
        "Is it too late to {change|correct} the shipping address?",
        "My new address is {3 River Close|44 Elm Drive}, please use that",
        "I gave you my {parents'|ex's} address, please use mine",
        "Reroute the parcel to {the shop downstairs|my workplace}, please",
        "I will be at my {aunt's|brother's} house, send the parcel there",
        "The address label should say {Unit 4|Building B}, please amend it",
        "Please replace the delivery address with my {dorm|hotel}",
        "Wrong {town|zip code} on the order, it needs a new address",
    ],
    "returns/damaged-item": [
        "The {vase|mirror} arrived in pieces",
        "My new {tablet|monitor} came with a cracked screen",
        "The box was crushed and the {plates|glasses} inside are broken",
        "There is a big scratch on the {table|desk} I received",
        "The {lamp|radio} you sent does not turn on, it is faulty",
        "One leg of the chair was {snapped|bent} when I unpacked it",
        "The bottle {leaked|broke} and ruined everything in the box",
        "I got a {kettle|toaster} that is broken, I want to return it",
        "The {jacket|bag} has a hole in it, straight out of the bag",
        "The {mug|teapot} was chipped when it arrived",
        "My {headphones|speakers} arrived defective, no sound on one side",
        "A part of the {shelf|bike} was smashed in transit",
        "The zip on the {coat|suitcase} was broken from the start",
        "It arrived damaged, can I {return it|get a replacement}?",
        "The {frame|cabinet} is dented and the paint has come off",
        "I opened the parcel and found {shattered|broken} glass",
        "The {toy|clock} stopped working after one hour, it must be defective",
        "There are stains and tears on the {dress|rug} you delivered",
        "Received a {torn|ripped} book with wet pages",
        "The {wardrobe|bookcase} came with a split door panel",
        "Sadly the {plant pot|candle} was cracked on arrival",
        "The {camera|watch} I unpacked today is broken",
        "The handle of the {pan|jug} had come off in the box",
        "You sent me a damaged {keyboard|printer}, half of it is broken",
        "My order got {soaked|squashed} on the way and is ruined",
        "The {blender|drill} smells of burning and is clearly faulty",
    ],
    "returns/wrong-size": [
        "The {shoes|boots} are too small, can I swap them?",
        "I ordered a medium but the {shirt|sweater} fits like a small",
        "These {jeans|trousers} are too long for me",
        "Can I exchange the {dress|skirt} for a larger size?",
        "The jacket is too {tight|narrow} across the shoulders",
        "You sent size {42|40} and I need one size up",
        "The ring does not fit my {finger|wife}, I need a bigger one",
        "My {hat|helmet} is too big and slides over my eyes",
        "The {coat|blazer} is lovely but two sizes too large",
        "I need the {gloves|socks} in small instead of large",
        "The trainers pinch my toes, please send a {bigger|wider} pair",
        "I got an extra large {hoodie|T-shirt} when I wear medium",
        "The sleeves are too {short|long}, I want a different size",
        "I guessed my size wrong, the {sandals|slippers} are too loose",
        "The {waist|collar} is too tight, do you have a bigger size?",
        "These boots run {small|large}, may I try another size?",
        "Please exchange the {belt|swimsuit}, it is too short for me",
        "The {pants|shorts} will not button up, I need a larger size",
        "My {daughter|son} needs the next size up in this raincoat",
        "The cardigan hangs off me, could I have {a smaller one|it in small}?",
        "I would like to swap a size {10|12} for a size 8",
        "It does not fit me at all, I want the same {blouse|vest} in large",
        "The {kids'|baby} pyjamas are far too small",
        "Could I trade these leggings for a {petite|tall} size?",
        "The {suit|uniform} is baggy on me, can I get a slimmer fit?",
        "Wrong size of {sneakers|heels} in the box, I take a 38",
    ],
    "app/crash-report": [
        "The app {crashes|closes} every time I open it",
        "Your {Android|iPhone} app freezes on the start screen",
        "Since the last update the app {will not open|keeps crashing}",
        "The app shuts down when I {tap search|open my basket}",
        "I get a {white|black} screen when the app loads",
        "My {phone|tablet} hangs as soon as I start your app",
        "The {checkout|photo} screen in the app crashes on my phone",
        "App version {4.2|5.1} stops working after a few seconds",
        "It crashes with error {500|0x1F} when I scroll the list",
        "The app freezes whenever I {rotate my phone|turn on Wi-Fi}",
        "I reinstalled the app and it still {crashes|freezes}",
        "The app quits by itself in the middle of {a search|browsing}",
        "Tapping on {settings|wishlist} makes the app crash",
        "The mobile app is {frozen|stuck} on the logo",
        "Every time I scan a barcode the app {dies|crashes}",
        "Your software keeps crashing on my {iPad|Pixel}",
        "The app has a bug, it {exits|crashes} after the splash screen",
        "The screen {goes blank|locks up} when I use the app",
        "After upgrading to the {new|latest} version the app won't start",
        "The app stopped responding when I {uploaded a photo|added a card}",
        "It force closes on {Android 14|my Samsung} right after launch",
        "Opening a {notification|message} crashes the app",
        "Your app is {unusable|broken} on my phone, it freezes all the time",
        "The app crashed {five times|again} this morning",
        "The {tablet|phone} app hangs and I have to restart it",
        "I see {unexpected error|fatal error} and then the app closes",
    ],
    "promo/code-rejected": [
        "The discount code {SAVE10|HELLO5} does not work",
        "My {voucher|coupon} is refused at checkout",
        "It says the promo code is {invalid|expired}, but it is new",
        "I cannot apply the {20|15} percent coupon to my basket",
        "Your newsletter promised a discount, but the code {fails|is rejected}",
        "The {student|birthday} discount is not accepted",
        "I entered {SPRING|WINTER} and the price stayed the same",
        "My gift voucher shows {zero|no} value when I enter the code",
        "The free shipping code was {rejected|declined}",
        "Why is my coupon not {valid|working}?",
        "The code from the {flyer|magazine} gives an error at checkout",
        "I have a {welcome|loyalty} code, and the site will not take it",
        "The promotion ends today and the code {does nothing|is refused}",
        "Your coupon box tells me the code {does not exist|is unknown}",
        "The {Black Friday|summer} discount did not come off the total",
        "My referral code is not being {accepted|applied}",
        "I tried the voucher {twice|three times} and it was declined",
        "The promo code {FRIENDS|WELCOME} was not recognised",
        "The offer said {10|25} percent off, but the code is not valid",
        "The checkout ignores my discount {code|voucher}",
        "I was given a coupon for {5 pounds|ten dollars} and it is rejected",
        "Code {LUCKY7|SUN20} is supposed to give me money off, but no luck",
        "My {two for one|half price} voucher cannot be redeemed",
        "The price does not drop when I enter the {promo|coupon} code",
        "How do I use the discount code? It is always {refused|invalid}",
        "The sale code you {mailed|texted} me is not working",
    ],
}

# Notes around a date, the later ones kept for the held-out rows.
NOTES_TRAIN = [
    "dentist on {}",
    "the lease ends on {}",
    "we met for the first time on {}",
    "{}: dinner with the Garcias",
    "flight to Lisbon leaves {}",
    "passport expires {}",
    "the invoice was issued on {} and paid a week later",
    "please return the library books by {}",
    "Anna was born on {}",
    "the shop reopened {} after the flood",
    "car inspection booked for {}, bring the papers",
    "the contract was signed in Oslo on {}",
    "on {} the server was moved to the new rack",
    "rent due {}",
    "I started piano lessons on {}",
    "the warranty runs until {}",
    "last backup made {}",
    "school term begins {}, buy pencils",
    "their wedding was on {}",
    "package shipped {}, arrives later",
    "the meeting was moved to {}",
    "call grandma on {}, it is her birthday",
    "plumber coming {} in the morning",
    "the film opened on {} to good reviews",
    "exam results come out on {}",
    "{} is the deadline for the grant",
    "bridge closed from {} for repairs",
    "she joined the firm on {} as an engineer",
    "vaccination given on {}",
    "according to the diary, it snowed on {}",
    "concert tickets for {} are in the drawer",
    "the old oak fell on {} in a storm",
]
NOTES_HELDOUT = [
    "haircut on {}",
    "the museum opens its doors on {}",
    "we sold the boat on {}",
    "{}: pick up the cake",
    "train to Vienna departs {}",
    "membership runs out on {}",
    "the letter is dated {} and came late",
    "send the form back before {}",
    "the eye test is on {}, bring glasses",
    "the baby took her first steps on {}",
    "the trial was held on {} in Geneva",
    "new tyres fitted {}",
]

ONES = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth"]
TEENS = ["eleven", "twelf", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"]
ORDINALS = [
    *ONES,
    "tenth",
    *(f"{word}th" for word in [*TEENS, "nineteen"]),
    "twentieth",
    *(f"twenty-{word}" for word in ONES),
    "thirtieth",
    "thirty-first",
]


def expand(pattern: str) -> Iterator[str]:
    """Yield every sentence that a pattern with {one|of|these} choices stands for."""
    match = re.search(r"\{([^}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    for choice in match[1].split("|"):
        yield from expand(pattern[: match.start()] + choice + pattern[match.end() :])


def triage_rows(rng: random.Random) -> tuple[list[Row], list[Row]]:
    """Support tickets and the queue each one belongs in: as many rows for every queue."""
    train: list[Row] = []
    heldout: list[Row] = []
    for queue, patterns in TICKETS.items():
        shuffled = rng.sample(patterns, len(patterns))
        unseen, seen = shuffled[:HELDOUT_PER_QUEUE], shuffled[HELDOUT_PER_QUEUE:]
        one_each = [rng.choice(list(expand(pattern))) for pattern in unseen]
        # two sentences of each seen pattern
        two_each = [text for pattern in seen for text in rng.sample(list(expand(pattern)), 2)]
        for rows, texts in ((heldout, one_each), (train, two_each[:TRAIN_PER_QUEUE])):
            rows += [
                {"prompt": f"Ticket: {text}\nQueue:", "completion": f" {queue}"} for text in texts
            ]
    return train, heldout


def phrase(day: datetime.date, rng: random.Random) -> str:
    """One of the many ways to write a date in English, its month as a word."""
    number = str(day.day)
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    nth = number + ("th" if 11 <= day.day <= 13 else suffix)
    word = ORDINALS[day.day - 1]
    month, short, weekday = day.strftime("%B"), day.strftime("%b"), day.strftime("%A")
    return rng.choice(
        [
            f"the {nth} of {month} {day.year}",
            f"the {word} of {month} {day.year}",
            f"{month} {number}, {day.year}",
            f"{month} {nth}, {day.year}",
            f"{short} {number} {day.year}",
            f"{number} {short} {day.year}",
            f"{number} {month} {day.year}",
            f"{weekday} {number} {month} {day.year}",
            f"{weekday}, {month} {number}, {day.year}",
            f"{nth} {short} {day.year}",
        ]
    )


def date_rows(rng: random.Random, days: list[datetime.date], notes: list[str]) -> list[Row]:
    """Notes that mention a day, and that day as YYYYMMDD."""
    rows: list[Row] = []
    for index, day in enumerate(days):
        note = notes[index % len(notes)].format(phrase(day, rng))
        rows.append({"prompt": f"Note: {note}\nDate:", "completion": f" {day:%Y%m%d}"})
    return rows


def draw_days(rng: random.Random, count: int) -> list[datetime.date]:
    """Different days from 1985 to 2025, as many in every month of the year as can be."""
    days: dict[datetime.date, None] = {}
    while len(days) < count:
        first = datetime.date(rng.randint(1985, 2025), len(days) % 12 + 1, 1)
        day = first + datetime.timedelta(days=rng.randrange(31))
        if day.month == first.month:
            days[day] = None
    return rng.sample(list(days), count)


def write(task: str, train: list[Row], heldout: list[Row]) -> None:
    """Check the two sets against each other and write them, one JSON object per line."""
    prompts = [row["prompt"] for row in train + heldout]
    if len(set(prompts)) != len(prompts):
        raise ValueError(f"{task}: a prompt occurs twice")
    folder = HERE / task
    folder.mkdir(exist_ok=True)
    for name, rows in (("train", train), ("heldout", heldout)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    """Write both tasks."""
    rng = random.Random(20210303)
    train, heldout = triage_rows(rng)
    rng.shuffle(train)
    rng.shuffle(heldout)
    write("triage", train, heldout)

    days = draw_days(rng, DATES_TRAIN + DATES_HELDOUT)
    train = date_rows(rng, days[:DATES_TRAIN], NOTES_TRAIN)
    heldout = date_rows(rng, days[DATES_TRAIN:], NOTES_HELDOUT)
    rng.shuffle(train)
    write("dates", train, heldout)


if __name__ == "__main__":
    main()
