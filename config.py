"""Every constant of a run: edit the values here, or give them as flags (BATCH_SIZE is --batch-size 32).

A comment behind a constant says its unit and effect; it is also the flag's help text.
"""

# ------------------------------------------------------------------------------------- run
DATA = ""                   # folder of images, flat or with folders inside; empty: the built-in demo set, drawn at first use
RUN = ""                    # name of the run, its folder under RUNS_DIR; empty: the data folder's name
RUNS_DIR = "runs"           # folder for all runs, the demo set and the cache of decoded images
STEPS = 20_000              # generator updates in all; a continued run counts its earlier ones
MINUTES = 0.0               # ends the run cleanly after so many minutes from this start; 0: only STEPS ends it
DEVICE = "auto"             # auto (CUDA, else MPS, else CPU), cuda, mps or cpu
SEED = 0                    # every random draw of the run follows from it
INIT_FROM = ""              # run, checkpoint or weights file whose networks a new run starts from; empty: from random ones

# ------------------------------------------------------------------------------------- images
IMAGE_SIZE = 128            # side of the pictures, pixels: a multiple of 16 from 32 to 256; 64 costs a third of 128
CHANNELS = 3                # 3 colour, 1 grey
FLIP = False                # mirrors each training picture with probability 1/2; on for photos, off where left is not right
BACKGROUND = 255            # grey level, 0 to 255, laid under transparent pictures
NUM_WORKERS = -1            # processes that decode at the first start; -1: one a core, 0: in this process
HELD_OUT_SHARE = 0.02       # share of the images kept from training, for honest reconstructions
HELD_OUT_MIN = 64           # images: with fewer than this to hold out, none is

# ------------------------------------------------------------------------------------- networks
LATENT_DIM = 128            # length of the noise vector z
WIDTH = 24                  # channels of the critic's first block, the decoder's last; doubled a block. 32: a step half as long again
ENCODER_WIDTH = 16          # the same for the encoder, whose time buys less: see the table in README.md
WIDTH_MAX = 256             # channels at most
NUM_FRAMES = 16             # frames of the synthetic video, the picture itself and 15 modified copies
PATCH = 16                  # side of the Transformer's patches, pixels: a multiple of 4 that divides IMAGE_SIZE
TRANSFORMER_DIM = 48        # width of a token, a multiple of TRANSFORMER_HEADS; 96 was no better and slower, see README.md
TRANSFORMER_HEADS = 12      # attention heads of each layer
TRANSFORMER_LAYERS = 12     # layers of the Transformer encoder
ALPHA_INIT = 3.0            # alpha at the start: tanh(3 * (2x - 1)) reaches level 254 of 255, with 2 only 250
ALPHA_SPAN = 3.0            # alpha stays within ALPHA_INIT / ALPHA_SPAN and ALPHA_INIT * ALPHA_SPAN; 1: no Transformer runs, see README.md
ALPHA_PER_CHANNEL = False   # one alpha a pixel and channel instead of one a pixel
VIDEO_SHIFT = 0.06          # largest shift of a frame, as a share of IMAGE_SIZE
VIDEO_BRIGHTNESS = 0.1      # largest change of a frame's brightness, of the range 0 to 1
VIDEO_NOISE = 0.05          # standard deviation of the last frame's noise, of the range 0 to 1
FEEDBACK_PROB = 0.0         # share of the updates whose video holds the pictures of a short walk before, not modified copies

# ------------------------------------------------------------------------------------- losses
LAMBDA_GP = 10.0            # weight of the gradient penalty (Gulrajani et al. 2017)
GP_EVERY = 4                # the penalty is measured on one picture in so many of each critic update: 1 is the paper's, all
LAMBDA_DRIFT = 1e-3         # weight of the squared scores, which keeps them centred
LAMBDA_REC = 100.0          # weight of the reconstruction error at 3 x 64 x 64, scaled to other sizes
LAMBDA_KL = 12.0            # weight of KL / (C*H*W), scaled alike; LAMBDA_KL / LAMBDA_REC is the Laplace scale b

# ------------------------------------------------------------------------------------- optimisation
BATCH_SIZE = 8              # pictures an update; on two cores 8 makes good pictures sooner than 16, see README.md; give a GPU more
MICRO_BATCH = 0             # pictures at once on the device, a divisor of BATCH_SIZE; 0: all. Less memory, same mathematics
N_CRITIC = 1                # critic updates before each generator update
LEARNING_RATE = 1e-3        # Adam's step size for the VAE
LAYER_RATE = 0.1            # Adam's step size for TransformerParamTanh, as a share of LEARNING_RATE; see README.md
CRITIC_LEARNING_RATE = 1e-3    # Adam's step size for the critic
BETA_1 = 0.0                # Adam's memory of the gradient; 0 as in Karras et al. 2018: momentum overshoots in this game
BETA_2 = 0.99               # Adam's memory of the squared gradient
EMA_HALF_LIFE_KIMG = 10.0   # thousands of images after which the averaged generator forgets half; what samples come from
EMA_RAMP = 0.1              # half-life at most this share of the images seen so far, so that early samples are no average of noise

NAN_PATIENCE = 20           # steps in a row without a finite gradient, after which the run goes back to its last checkpoint
MAX_ROLLBACKS = 3           # times that a run goes back, each time with half the learning rates, before it gives up

# ------------------------------------------------------------------------------------- speed
BFLOAT16 = True             # CUDA: convolutions and products in bfloat16 where it is safe; off: all in float32
TF32 = True                 # CUDA: float32 products with 10-bit mantissas, several times faster
CUDA_GRAPH = True           # CUDA, one process: a step's kernels are recorded once and then started as one
RECOMPUTE_ACTIVATIONS = False    # computes the generator's blocks twice to save memory (activation checkpointing)

# ------------------------------------------------------------------------------------- logging
LOG_EVERY = 20              # steps between two lines of metrics.jsonl
SAMPLE_EVERY = 1_000        # steps between sample sheets; the first come sooner, at 0, 50, 100, 200, 400, ...
SAMPLE_COUNT = 36           # pictures on a sample sheet
EVALUATE_EVERY = 1_000      # steps between two scores of generated pictures, which choose best.pt; 0: none
EVALUATE_COUNT = 512        # pictures for a score: more are steadier and take longer
CHECKPOINT_EVERY = 1_000    # steps between checkpoints ...
CHECKPOINT_MINUTES = 10.0   # ... and minutes, whichever comes first

# ------------------------------------------------------------------------------------- derived, no flags
TRANSFORMER_IN_CHANNELS = NUM_FRAMES * CHANNELS    # channels of the stacked synthetic video
