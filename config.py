"""Every constant of a run: edit the values here, or give them as flags (BATCH_SIZE is --batch-size 32).

The comment behind a constant gives its unit and effect; it is also the help text of the flag.
"""

# ------------------------------------------------------------------------------------- run
DATA = ""                   # folder of images, flat or with subfolders; empty: the built-in demo set, drawn at the first use
RUN = ""                    # name of the run and of its folder under RUNS_DIR; empty: the name of the data folder
RUNS_DIR = "runs"           # folder of all runs, the demo set and the cache of decoded images
STEPS = 20_000              # generator updates in total; a resumed run counts its earlier ones
MINUTES = 0.0               # minutes after this start at which the run ends with a checkpoint; 0: only STEPS ends it
DEVICE = "auto"             # auto (CUDA, else MPS, else CPU), cuda, mps or cpu
SEED = 0                    # determines every random draw of the run
INIT_FROM = ""              # run, checkpoint or weights file that a new run takes its initial weights from; empty: random

# ------------------------------------------------------------------------------------- images
FOLDERS = "ignore"          # what folders below DATA are. ignore: all images are one set; classes: each folder is a class; clips: each folder, .gif, .webp and video file is a clip
BALANCE_CLASSES = False     # classes: all classes are trained on equally often, instead of all images
CLIP_STRIDE = 1             # every how many frames of a clip one is taken
IMAGE_SIZE = 128            # side in pixels, a multiple of 16 from 32 to 512; 64 takes a third of the time of 128; above 256, PATCH 32 where it divides IMAGE_SIZE
CHANNELS = 3                # 3 colour, 1 grey, 4 colour with transparency
AUGMENT = -1.0              # share of the training images that are turned, shifted and recoloured; generated ones are not. -1: rises while the prior overfits, see docs/running.md
FLIP = False                # mirrors each training image with probability 1/2; on for photos, off where left and right differ
FIT = "crop"                # of images that are not square. crop: cuts off the ends; pad: adds borders of BACKGROUND; stretch: changes the proportions
BACKGROUND = 255            # grey level, 0 to 255, behind transparent images
NUM_WORKERS = -1            # processes that decode images at the first start; -1: one per core, 0: none, in this process
HELD_OUT_SHARE = 0.02       # share of the images that are never trained on, to measure reconstructions and overfitting; 0: none. Sets below 3,200 images hold out 5% or about 16, those below 80 none

# ------------------------------------------------------------------------------------- networks
LATENT_DIM = 128            # length of the noise vector z and of the codes
PRIOR_WIDTH = 384           # units per layer of the network that turns noise into codes
WIDTH = 24                  # channels of the decoder's last and the critic's first block, doubled per block; 32: steps take 1.5 times as long
ENCODER_WIDTH = 16          # the same for the encoder; wider gained nothing in equal time, see docs/recipe.md
WIDTH_MAX = 256             # largest number of channels
BALANCED_UPSAMPLING = True  # the decoder makes flat areas from flat features; without it photos get a stronger grid of dots
NOISE_MAPS = True           # adds a fixed noise map to each channel of each decoder block, with learned strengths: texture without a grid
FINAL_WIDTH = 12            # channels that the decoder's last block writes beside the pixels, for a convolution at full size; 0: none
NUM_FRAMES = 16             # frames of the synthetic video: the image and 15 modified copies
PATCH = 16                  # side of the Transformer's patches in pixels, a multiple of 4 that divides IMAGE_SIZE
TRANSFORMER_DIM = 48        # length of a token, a multiple of TRANSFORMER_HEADS; 96 was slower and no better, see docs/recipe.md
TRANSFORMER_HEADS = 12      # attention heads per layer
TRANSFORMER_LAYERS = 12     # layers of the Transformer encoder
ALPHA_INIT = 3.0            # initial alpha: tanh(3) reaches level 254 of 255, tanh(2) only 250
ALPHA_SPAN = 3.0            # alpha stays within ALPHA_INIT / ALPHA_SPAN and ALPHA_INIT * ALPHA_SPAN; 1: fixed alpha, no Transformer, see docs/layer.md
ALPHA_PER_CHANNEL = False   # one alpha per pixel and channel instead of one per pixel
VIDEO_SHIFT = 0.06          # largest shift of a frame, share of IMAGE_SIZE
VIDEO_BRIGHTNESS = 0.1      # largest brightness change of a frame, share of the range 0 to 1
VIDEO_NOISE = 0.05          # standard deviation of the last frame's noise, share of the range 0 to 1

# ------------------------------------------------------------------------------------- losses
LAMBDA_GP = 10.0            # weight of the gradient penalty (Gulrajani et al. 2017)
GP_EVERY = 4                # the penalty uses every 4th image of a critic update; 1: all images, as in the paper, slower
LAMBDA_DRIFT = 1e-3         # weight of the squared scores, which keeps them centred
LAMBDA_REC = 100.0          # weight of the reconstruction error at 3 x 64 x 64, scaled for other sizes
LAMBDA_KL = 12.0            # weight of KL / (C*H*W), scaled alike; LAMBDA_KL / LAMBDA_REC is the Laplace scale b

# ------------------------------------------------------------------------------------- video, with FOLDERS = "clips"
VAE_KIMG = 40.0             # clips: thousand images after which stage 1 ends: the VAE is frozen, and the Transformer starts to learn motion
DYNAMICS_KIMG = 100.0       # clips: thousand images, and windows of stage 2, after which stage 3 begins: decoder, Transformer and critics learn together
MOTION_DIM = 6              # length of the motion code v: what a still start does not show, such as direction and speed
MOTION_BATCH = 16           # windows of NUM_FRAMES - 1 frames per update of stage 2, over all processes, even
MOTION_LEARNING_RATE = 1e-3    # Adam's learning rate in stage 2; it falls from the middle of the stage on
COLD_SHARE = 0.4            # share of the windows that start still, as generated videos do: copies of one frame
FEEDBACK = 0.2              # share of the way that the code of each frame of a video moves to that of its image: keeps objects whole; 0: off, details and colours last longer
LAMBDA_CODE = 10.0          # weight of the mean absolute error of predicted codes
LAMBDA_FRAME = 50.0         # weight of the mean absolute error of a rendered frame, larger where it moves
LAMBDA_MOTION = 0.02        # weight of the KL divergence of v, of still starts
JOINT_ERROR_SHARE = 0.2     # stage 3: share of LAMBDA_REC and LAMBDA_FRAME that is left; with all of it videos begin blurred, see docs/video.md
LAMBDA_PAIR = 0.3           # stage 3: weight of the scores of the two critics of pairs of frames
JOINT_LEARNING_RATE = 1e-3  # Adam's learning rate for the decoder in stage 3 ...
JOINT_LAYER_RATE = 3e-5     # ... and for TransformerParamTanh: faster, the critics pull it off the clips, see docs/video.md

# ------------------------------------------------------------------------------------- optimisation
BATCH_SIZE = 16             # images per update, over all processes; on a few cores 8 is as good in equal time, a GPU needs 32 or more
MICRO_BATCH = 0             # images on the device at once, a divisor of BATCH_SIZE; 0: all. Saves memory, same gradients
N_CRITIC = 1                # critic updates per generator update
LEARNING_RATE = 1e-3        # Adam's learning rate for the VAE and the prior
LAYER_RATE = 0.1            # learning rate of TransformerParamTanh as a share of LEARNING_RATE; 1 was worse, see docs/recipe.md
CRITIC_LEARNING_RATE = 1e-3    # Adam's learning rate for the critic
DECAY_FROM_KIMG = 0.0       # thousand images after which both learning rates fall, linearly to 5% at DECAY_TO_KIMG
DECAY_TO_KIMG = 0.0         # thousand images after which the learning rates stay at 5%; 0: they never fall
BETA_1 = 0.0                # Adam's decay of the mean gradient; 0 as in Karras et al. 2018: momentum overshoots between two networks
BETA_2 = 0.99               # Adam's decay of the mean squared gradient
EMA_HALF_LIFE_KIMG = 10.0   # half-life of the averaged generator, which all samples come from, in thousands of images
EMA_RAMP = 0.1              # largest half-life as a share of the images seen, so that early samples do not average noise

NAN_PATIENCE = 20           # steps in a row with a non-finite gradient before the run returns to its last checkpoint
MAX_ROLLBACKS = 3           # such returns, each with half the learning rates, before the run gives up

# ------------------------------------------------------------------------------------- speed
BFLOAT16 = True             # CUDA: bfloat16 autocast; scores, gradient norms, alpha and images stay float32
TF32 = True                 # CUDA: float32 products with 10-bit mantissas, several times faster
CUDA_GRAPH = True           # CUDA, one process: records the kernels of a step once and then starts them as one
DEVICE_IMAGES = 0.25        # CUDA: the images are kept on the device if they need at most this share of its free memory; 0: never
RECOMPUTE_ACTIVATIONS = False    # computes the generator's blocks twice to save memory (activation checkpointing)

# ------------------------------------------------------------------------------------- logging
LOG_EVERY = 20              # steps between lines of metrics.jsonl
TENSORBOARD = False         # also writes the logged values and the sample sheets for TensorBoard, which requirements-extras.txt installs
SAMPLE_EVERY = 1_000        # steps between sample sheets; more often at the start: 0, 50, 100, 200, 400, ...
SAMPLE_COUNT = 36           # images per sample sheet
EVALUATE_EVERY = 1_000      # steps between scores of generated images, which choose best.pt; 0: none
EVALUATE_COUNT = 512        # images per score: more are more exact and take longer
CHECKPOINT_EVERY = 1_000    # steps between checkpoints ...
CHECKPOINT_MINUTES = 10.0   # ... and minutes, whichever comes first

# ------------------------------------------------------------------------------------- derived, no flags
TRANSFORMER_IN_CHANNELS = NUM_FRAMES * CHANNELS    # channels of the stacked synthetic video
CLASSES = []                # names of the class folders in DATA, with FOLDERS = "classes"
